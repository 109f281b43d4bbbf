package proxy

import (
	"fmt"
	"math"
	"strconv"
)

// Limits are what a peer may ask of the gateway. 0 is the default, a negative value none.
type Limits struct {
	Head        int // 32 KiB: start line and fields of a request (431) or response (502), in bytes; none is MaxHead
	Fields      int // 200: field lines of a request (431) or response (502)
	RequestLine int // 16 KiB: with its CRLF, in bytes (414); judged while the line still comes
}

// MaxHead is the largest Limits.Head: a head is held in memory as a whole.
const MaxHead = 1 << 20

func (l Limits) withDefaults() (Limits, error) {
	if l.Head > MaxHead {
		return l, fmt.Errorf("proxy: Config.Limits.Head is %d: it must be at most %d", l.Head, MaxHead)
	}
	for _, limit := range []struct {
		value          *int
		standard, none int
	}{
		{&l.Head, 32 << 10, MaxHead},
		{&l.Fields, 200, math.MaxInt},
		{&l.RequestLine, 16 << 10, math.MaxInt},
	} {
		switch {
		case *limit.value == 0:
			*limit.value = limit.standard
		case *limit.value < 0:
			*limit.value = limit.none
		}
	}
	return l, nil
}

// explain is the text of a refusal, with the limit that was passed if it is one of these.
func (l *Limits) explain(err *refusal) string {
	switch err {
	case errHeadTooLarge, errResponseHead:
		return err.text + " of " + bytesText(l.Head)
	case errFields, errResponseFields:
		return err.text + " of " + strconv.Itoa(l.Fields)
	case errRequestLineTooLong:
		return err.text + " of " + bytesText(l.RequestLine)
	}
	return err.text
}

// bytesText writes a number of bytes for people: 32 KiB, 1 MiB, 1000 bytes.
func bytesText(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return strconv.Itoa(n>>20) + " MiB"
	case n >= 1<<10 && n%(1<<10) == 0:
		return strconv.Itoa(n>>10) + " KiB"
	}
	return strconv.Itoa(n) + " bytes"
}
