package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"unicode/utf8"
)

// The scanner finds the tokens that a json.Decoder finds in everything that is right.
func FuzzScanner(f *testing.F) {
	for _, s := range []string{inst1, `{}`, `[[],{"a":[1,-2e3 ,true,false,null]}]`, ` "\u00e9\n\"\\" `, `-0.5`, `"\ud800"`, "{\"a\" :\t\"b\"\r\n,\"\":\"/,:]}\"}", `"\\"`, "7 "} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if !utf8.Valid(text) || !json.Valid(text) {
			return
		}
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		s := &scanner{text}
		for {
			want, err := dec.Token()
			if err == io.EOF {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			says := fmt.Sprint(want)
			var kind byte
			switch want.(type) {
			case nil:
				kind, says = 'n', "null"
			case string:
				kind = '"'
			case json.Number:
				kind = '0'
			default:
				kind = says[0]
			}
			if got := s.next(); got.kind != kind || string(got.text) != says {
				t.Fatalf("%q: %c %q, want %c %q", text, got.kind, got.text, kind, says)
			}
		}
	})
}
