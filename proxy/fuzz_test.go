package proxy

import (
	"bufio"
	"bytes"
	"io"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"kerberos/registry"
)

// FuzzRequestHead holds our reading of a request head against net/http's: what we take it must take, and both must agree
// on where the request goes and where it ends. And what we send on must be read the same way again, by both.
//
// net/http refuses more than we do in two places, on purpose: it decodes the target, and cannot where a "%" has no two
// digits behind it, while we pass targets on as they are; and it refuses a Trailer field that announces framing fields,
// while we drop these from the trailers when they come.
func FuzzRequestHead(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /echo/%2F?x=y HTTP/1.0\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: a:80\r\nContent-Length: 0012\r\nX_Forwarded_For: 1\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
		"GET http://b.example:8080/x?y HTTP/1.1\r\nHost: a\r\nConnection: close, X-A\r\nX-A: 1\r\n\r\n",
		"GET https://b?y HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: 3\r\n\r\n",
		"OPTIONS /x HTTP/1.1\r\nHost: a\r\nMax-Forwards: 3\r\nConnection: max-forwards, host, content-length\r\nContent-Length: 1\r\n\r\n",
		"GET //evil.example/x?:// HTTP/1.1\r\nHost: a\r\nVia: 1.1 b\r\nForwarded: for=x\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n folded\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nExpect: 100-continue\r\nTE: trailers\r\n\r\n",
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	c := unconnected(f)
	f.Fuzz(func(t *testing.T, data []byte, trusted bool) { checkRequestHead(t, c, data, trusted) })
}

// TestRequestHeads does the same to heads that a fuzzer would take long to find: put together from parts that are each
// plausible or nearly so.
func TestRequestHeads(t *testing.T) {
	parts := [][]string{
		{"GET", "POST", "OPTIONS", "HEAD", "get", "CONNECT", "G(T", ""},
		{" ", "  ", "\t", ""},
		{"/", "/x?y=z", "*", "http://b", "http://b:80/x?", "HTTPS://[::1]:1?q", "//b/x", "/%zz", "/%41%2f?%", "/\xff", "/a#b", "http://", "http://u@b/", "http://b%41/", "http://b:/", "http://b]c/", "/a:b", "?x", "a:1"},
		{" HTTP/1.1", " HTTP/1.1", " HTTP/1.1", " HTTP/1.0", " HTTP/1.2", " HTTP/2.0", " HTTP/1.1 ", ""},
		{"\r\n", "\r\n", "\r\n", "\n", "\r\n "},
		{"Host: a\r\n", "Host: a\r\n", "host:a:80 \r\n", "", "Host: a\r\nHost: a\r\n", "Host: [::1]:8\r\n", "Host:\r\n", "Host : a\r\n", "Host: a!$&'()*+;=~%zz\r\n", "Host_: a\r\n"},
		{"", "", "Content-Length: 0\r\n", "Content-Length: 00012\r\n", "content-length:5\t\r\n", "Content-Length: +5\r\n", "Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: 5, 5\r\n", "Content_Length: 3\r\n", "Content-Length: 999999999999999999\r\n", "Content-Length:\r\n"},
		{"", "", "", "Transfer-Encoding: chunked\r\n", "transfer-encoding:\tCHUNKED \r\n", "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: identity\r\n", "Transfer-Encoding:\r\n chunked\r\n", "Transfer_Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"},
		{"", "", "Connection: close\r\n", "Connection: Keep-Alive\r\n", "connection: x-a, host, CLOSE,\r\nX-A: 1\r\n", "Connection: close-not, content-length\r\n", "Connection: keep-alive\r\nConnection: close\r\n", "Connection: transfer-encoding, x-forwarded-for\r\n", "Connection: \"close\"\r\n"},
		{"", "", "X-Forwarded-For: 1\r\n", "Forwarded: for=1\r\nX-Real-IP: 1\r\n", "X_Real_IP: 1\r\nX-Forwarded-Host: b\r\n", "TE: trailers\r\nUpgrade: h2c\r\nKeep-Alive: 1\r\n", "Expect: 100-continue\r\n", "X-\x00: 1\r\n", "X-A: \x7f\r\n", "X-A: \xff\r\n", "X-A: a\rb\r\n", "X-A\r\n", ": 1\r\n", "X A: 1\r\n", " X-A: 1\r\n", "Max-Forwards: 5\r\n", "Trailer: X-A\r\n"},
		{"\r\n", "\r\n", "\r\n", "\n\r\n"},
	}
	c := unconnected(t)
	checkCombinations(t, parts, func(t *testing.T, data []byte, trusted bool) bool { return checkRequestHead(t, c, data, trusted) })
}

// checkCombinations puts one of each parts together, 20,000 times, and wants some of them to be taken.
func checkCombinations(t *testing.T, parts [][]string, check func(t *testing.T, data []byte, flag bool) bool) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	taken := 0
	for range 20_000 {
		var head []byte
		for _, part := range parts {
			i := 0 // the first of each makes a plain message
			if random.IntN(3) == 0 {
				i = random.IntN(len(part))
			}
			head = append(head, part[i]...)
		}
		if check(t, head, random.IntN(2) == 0) {
			taken++
		}
	}
	if taken < 1000 {
		t.Errorf("only %d heads were taken", taken)
	}
}

// unconnected makes what appendHead needs of a connection.
func unconnected(t testing.TB) *conn {
	p, err := New(Config{Registry: registry.New(registry.Config{})}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	c := &conn{p: p, peer: netip.MustParseAddr("192.0.2.1")}
	c.constant = forwardingFields(c.peer)
	return c
}

// checkRequestHead reads the head that data starts with; it reports whether we take it.
func checkRequestHead(t *testing.T, c *conn, data []byte, trusted bool) bool {
	t.Helper()
	end := bytes.Index(data, headEnd)
	if end < 0 || bytes.HasPrefix(data, []byte("\r\n")) {
		return false // readHead never hands such a thing to parse
	}
	head := data[:end+len(headEnd)]
	r, first := &Request{}, &Request{}
	err, errFirst := r.parse(head, c.p.cfg().via, trusted, &standard), first.parse(data, c.p.cfg().via, trusted, &standard)
	if err != errFirst || err == nil && (r.size != len(head) || first.size != r.size || !bytes.Equal(first.lines, r.lines)) {
		t.Fatalf("%q alone: %v, %d bytes; before others: %v, %d bytes", head, err, r.size, errFirst, first.size)
	}
	if first.parse(head[:len(head)-1], c.p.cfg().via, trusted, &standard) == nil {
		t.Fatalf("we take %q without its end", head)
	}
	if err != nil || is(r.Method, "connect") && !r.authority {
		return false // such a CONNECT is refused, whatever its target means
	}
	want, failed := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
	if failed != nil {
		if brokenEscape(r.target) || r.Header("Trailer") != nil {
			return false
		}
		t.Fatalf("we take %q, net/http does not: %v", head, failed)
	}
	agree(t, r, want)

	r.Client = c.peer
	c.trusted = trusted
	sent := c.appendHead(nil, r, &route{}, &registry.Target{Authority: "backend:80"})
	again := &Request{}
	if err := again.parse(sent, nil, false, &standard); err != nil {
		t.Fatalf("%q goes on as %q, which we would not take: %v", head, sent, err)
	}
	if want, failed = http.ReadRequest(bufio.NewReader(bytes.NewReader(sent))); failed != nil {
		t.Fatalf("%q goes on as %q, which net/http does not take: %v", head, sent, failed)
	}
	agree(t, again, want)
	if !bytes.Equal(again.Method, r.Method) || !bytes.Equal(again.target, r.target) || again.minor != 1 ||
		again.framing != r.framing || len(r.Host) > 0 && !bytes.Equal(again.Host, r.Host) {
		t.Errorf("%q goes on as %q: another request", head, sent)
	}
	for _, name := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Upgrade", "Expect", "Proxy-Authorization", "Proxy-Authenticate"} {
		if v := want.Header[name]; v != nil {
			t.Errorf("%q goes on with %s %q", head, name, v)
		}
	}
	for name := range want.Header {
		if strings.Contains(name, "_") && identify([]byte(strings.ReplaceAll(name, "_", "-"))) != fieldOther {
			t.Errorf("%q goes on with %s", head, name)
		}
	}
	for name, value := range map[string]string{"X-Forwarded-For": "192.0.2.1", "X-Real-Ip": "192.0.2.1", "X-Forwarded-Proto": "http"} {
		if v := want.Header[name]; !trusted && !slices.Equal(v, []string{value}) {
			t.Errorf("%q goes on with %s %q", head, name, v)
		}
	}
	return true
}

// agree fails the test unless our reading of a request and net/http's are the same.
func agree(t *testing.T, r *Request, want *http.Request) {
	t.Helper()
	path, err := url.PathUnescape(string(r.Path))
	if err != nil {
		t.Fatalf("net/http took the path %q: %v", r.Path, err)
	}
	if want.URL.Path == "" && want.Method != http.MethodOptions && !r.authority {
		want.URL.Path = "/"
	} else if want.URL.Path == "" {
		want.URL.Path = path // OPTIONS http://a: net/http leaves it open whether this is "/" or "*"
	}
	length := int64(0)
	switch {
	case r.chunked:
		length = -1
	case r.length > 0:
		length = r.length
	}
	chunked := slices.Equal(want.TransferEncoding, []string{"chunked"})
	closes := r.close || r.minor == 0 && !r.keepAlive
	if string(r.Method) != want.Method || path != want.URL.Path || string(r.Query) != want.URL.RawQuery || string(r.Host) != want.Host ||
		int(r.minor) != want.ProtoMinor || length != want.ContentLength || r.chunked != chunked || closes != want.Close {
		t.Fatalf("we read %s %q ? %q of %q, HTTP/1.%d, length %d, chunked %v, close %v; net/http reads %s %q ? %q of %q, HTTP/1.%d, length %d, chunked %v, close %v",
			r.Method, path, r.Query, r.Host, r.minor, length, r.chunked, closes,
			want.Method, want.URL.Path, want.URL.RawQuery, want.Host, want.ProtoMinor, want.ContentLength, chunked, want.Close)
	}
}

// brokenEscape reports a "%" that is not followed by two hexadecimal digits in front of the query.
func brokenEscape(target []byte) bool {
	path, _, _ := bytes.Cut(target, []byte("?"))
	_, err := url.PathUnescape(string(path))
	return err != nil
}

// FuzzResponseHead holds our reading of a response head against net/http's in the same way. The one thing that net/http
// refuses and we don't is a Trailer field that announces framing fields.
func FuzzResponseHead(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
		"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n",
		"HTTP/1.0 404 Not Found\r\nConnection: keep-alive, X-A\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.0 200 \r\n\r\n",
		"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nDate: x\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nConnection: close\r\nConnection: Date\r\nDate: x\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\r\nKeep-Alive: 1\r\nUpgrade: h2c\r\nProxy-Connection: x\r\nSet-Cookie: a\r\nset-cookie: b\r\n\r\n",
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	f.Fuzz(func(t *testing.T, data []byte, head bool) { checkResponseHead(t, data, head) })
}

// TestResponseHeads does the same to heads put together from parts.
func TestResponseHeads(t *testing.T) {
	checkCombinations(t, [][]string{
		{"HTTP/1.1 ", "HTTP/1.1 ", "HTTP/1.0 ", "HTTP/1.2 ", "HTTP/2.0 ", "http/1.1 ", "HTTP/1.1  ", "HTTP/1.1\t", "ICY ", "\r\nHTTP/1.1 "},
		{"200", "204", "304", "103", "101", "404", "599", "600", "099", "20", "2000", "+20", " 20", "2 0"},
		{" OK", "", " ", "  ", " \xff\t", " a\rb", "OK", "\t"},
		{"\r\n", "\r\n", "\r\n", "\n", "\r\n "},
		{"Content-Length: 5\r\n", "", "Content-Length: 0\r\n", "content-length:5\t\r\n", "Content-Length: 05\r\n", "Content-Length: +5\r\n", "Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: 5, 5\r\n", "Content_Length: 3\r\n", "Content-Length:\r\n"},
		{"", "", "", "Transfer-Encoding: chunked\r\n", "transfer-encoding:\tCHUNKED \r\n", "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: identity\r\n", "Transfer-Encoding:\r\n chunked\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"},
		{"", "", "Connection: close\r\n", "Connection: Keep-Alive\r\n", "connection: x-a, date, CLOSE,\r\nX-A: 1\r\n", "Connection: close-not, content-length\r\n", "Connection: keep-alive\r\nConnection: close\r\n", "Connection: transfer-encoding\r\n"},
		{"", "Date: x\r\n", "TE: trailers\r\nUpgrade: h2c\r\nKeep-Alive: 1\r\n", "X-\x00: 1\r\n", "X-A: \x7f\r\n", "X-A: \xff\r\n", "X-A: a\rb\r\n", "X-A\r\n", ": 1\r\n", "X A: 1\r\n", " X-A: 1\r\n", "Trailer: X-A\r\n", "Set-Cookie: a\r\nset-cookie: b\r\n"},
		{"\r\n", "\r\n", "\r\n", "\n\r\n"},
	}, checkResponseHead)
}

// checkResponseHead reads the head that data starts with; it reports whether we take it.
func checkResponseHead(t *testing.T, data []byte, head bool) bool {
	t.Helper()
	end := bytes.Index(data, headEnd)
	if end < 0 {
		return false
	}
	var r, first response
	errFirst := first.parse(data, &standard)
	data = data[:end+len(headEnd)]
	if err := r.parse(data, &standard); err != errFirst || err == nil && (r.size != len(data) || first.size != r.size) {
		t.Fatalf("%q alone: %v, %d bytes; before others: %v, %d bytes", data, err, r.size, errFirst, first.size)
	}
	if errFirst != nil {
		return false
	}
	if first.parse(data[:len(data)-1], &standard) == nil {
		t.Fatalf("we take %q without its end", data)
	}
	method := http.MethodGet
	if head {
		method = http.MethodHead
	}
	read := func(data []byte) *http.Response {
		response, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data)), &http.Request{Method: method})
		if err != nil && !bytes.Contains(bytes.ToLower(data), []byte("trailer")) {
			t.Fatalf("we take %q, net/http does not: %v", data, err)
		}
		return response
	}
	want := read(data)
	if want == nil {
		return false
	}
	bodyless := r.bodyless(head)
	toClose := !bodyless && !r.chunked && r.length < 0
	if r.status != want.StatusCode || (r.close || toClose) != want.Close {
		t.Fatalf("%q: we read status %d, close %v, net/http %d, %v", data, r.status, r.close || toClose, want.StatusCode, want.Close)
	}
	chunked := slices.Equal(want.TransferEncoding, []string{"chunked"})
	if !bodyless && (r.chunked != chunked || r.length != want.ContentLength) {
		t.Fatalf("%q: we read length %d, chunked %v, net/http %d, %v", data, r.length, r.chunked, want.ContentLength, chunked)
	}

	sent := append(r.append(nil, nil), "\r\n"...)
	var again response
	if again.parse(sent, &standard) != nil {
		t.Fatalf("%q goes on as %q, which we would not take", data, sent)
	}
	if again.status != r.status || again.minor != 1 || again.chunked || again.close || again.hasDate != r.hasDate ||
		again.length != r.length && r.status >= 200 && r.status != 204 {
		t.Errorf("%q goes on as %q: another response", data, sent)
	}
	if want = read(sent); want == nil {
		return true
	}
	for _, name := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Upgrade", "Proxy-Authorization", "Proxy-Authenticate", "Transfer-Encoding"} {
		if v := want.Header[name]; v != nil {
			t.Errorf("%q goes on with %s %q", data, name, v)
		}
	}
	return true
}

// readChunks reads a chunked body that comes in pieces of the given sizes, the last of them again and again, with at most
// limit bytes taken at once.
func readChunks(wire []byte, sizes []byte, limit int) (data, trailers, rest []byte, done bool, err error) {
	size := len(wire)
	in := buffer{b: make([]byte, 16)}
	if len(sizes) == 0 {
		in.b = make([]byte, size+1) // all of it at once
	}
	var d body
	d.start(framing{length: -1, chunked: true})
	for {
		piece, done, err := d.next(&in, limit)
		data = append(data, piece...)
		switch {
		case err != nil, done:
			return data, d.trailers, append(bytes.Clone(in.waiting()), wire...), done, err
		case len(piece) > 0:
			continue
		case len(wire) == 0:
			return data, d.trailers, nil, false, nil
		}
		if len(sizes) > 0 {
			size, sizes = int(sizes[0])+1, sizes[1:]
		}
		room := in.space(maxHead)
		n := copy(room, wire[:min(size, len(wire))])
		in.w += n
		wire = wire[n:]
	}
}

// A line may be as long as its limit wherever its segments end. What cannot become right is not waited for.
func TestChunkLines(t *testing.T) {
	if _, _, _, _, err := readChunks([]byte("5\r\nhello!"), nil, maxHead); err == nil {
		t.Error("a chunk goes on past its size, and that is not seen")
	}
	for _, over := range []int{0, 1} {
		for _, line := range []string{"0;", "0\r\nX-A:"} {
			last := line[strings.IndexByte(line, '\n')+1:]
			wire := []byte(line + strings.Repeat("x", maxChunkLine-len(last)-1+over) + "\r\n\r\n")
			if line != "0;" {
				wire = append(wire, "\r\n"...)
			}
			for _, size := range []byte{0, 1, 6, 255} {
				if _, _, _, done, err := readChunks(wire, []byte{size}, maxHead); done != (over == 0) || (err != nil) != (over == 1) {
					t.Errorf("%q and %d bytes in pieces of %d: done %v, %v", line, over, int(size)+1, done, err)
				}
			}
			if _, _, _, done, err := readChunks(wire, nil, maxHead); done != (over == 0) || (err != nil) != (over == 1) {
				t.Errorf("%q and %d bytes at once: done %v, %v", line, over, done, err)
			}
		}
	}
}

// FuzzChunks reads chunked bodies: it must not matter how they are cut into segments, and what we take to be whole
// net/http takes too, with the same data, the same trailers and the same end.
func FuzzChunks(f *testing.F) {
	for _, seed := range []string{
		"0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1", "00a;x=\"y\"\r\n0123456789\r\n0;z\r\nX-A: 1\r\nHost: a\r\nx_forwarded_for: 1\r\n\r\n",
		"5\r\nhello\n0\r\n\r\n", "5\nhello\r\n0\r\n\r\n", "-1\r\n", "fffffffffffffff\r\nx", "10000000000000000\r\nx", "5 \r\nhello\r\n0\r\n X: 1\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n",
		"51\nhello\r\n0\r\n\r\n", "0;\nX\r\n\r\n", "0 ;\r\n\r\n", "5\t;a\r\nhello\r\n0\r\n\r\n",
	} {
		f.Add([]byte(seed), []byte{0}, uint16(1))
		f.Add([]byte(seed), []byte{3, 0, 7}, uint16(2))
	}
	f.Fuzz(func(t *testing.T, wire, sizes []byte, limit uint16) {
		data, trailers, rest, done, err := readChunks(wire, nil, maxHead)
		data2, trailers2, rest2, done2, err2 := readChunks(wire, sizes, int(limit)+1)
		if !bytes.Equal(data, data2) || done != done2 || err != err2 || done && (!bytes.Equal(trailers, trailers2) || !bytes.Equal(rest, rest2)) {
			t.Fatalf("%q in one piece: %q, %q, rest %q, done %v, %v; in pieces %v, at most %d: %q, %q, rest %q, done %v, %v",
				wire, data, trailers, rest, done, err, sizes, limit, data2, trailers2, rest2, done2, err2)
		}
		if !done {
			return
		}
		for _, head := range []string{"POST / HTTP/1.1\r\nHost: a\r\n", "HTTP/1.1 200 OK\r\n"} { // both directions
			in := bufio.NewReaderSize(io.MultiReader(strings.NewReader(head+"Transfer-Encoding: chunked\r\n\r\n"), bytes.NewReader(wire)), 2*maxTrailers)
			var from io.Reader
			var theirs *http.Header
			if head[0] == 'P' {
				want, err := http.ReadRequest(in)
				if err != nil {
					t.Fatal(err)
				}
				from, theirs = want.Body, &want.Trailer
			} else {
				want, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				from, theirs = want.Body, &want.Trailer
			}
			body, readErr := io.ReadAll(from)
			if readErr != nil {
				if strings.Contains(readErr.Error(), "too much non-data") { // its measure for extensions that are only ballast
					return
				}
				t.Fatalf("we take %q, net/http does not: %v", wire, readErr)
			}
			if !bytes.Equal(body, data) {
				t.Fatalf("%q: we read %q, net/http %q", wire, data, body)
			}
			behind, _ := io.ReadAll(in)
			if !bytes.Equal(behind, rest) {
				t.Fatalf("%q: behind it we have %q, net/http %q", wire, rest, behind)
			}
			for line := range bytes.Lines(trailers) {
				fld, _, err := readField(line)
				if err != nil || !slices.Contains((*theirs)[http.CanonicalHeaderKey(string(fld.name))], string(fld.value)) {
					t.Errorf("%q: the trailer %q is not in net/http's %v", wire, line, *theirs)
				}
			}
		}

		// What goes on is read as the same again.
		sent := appendLastChunk(nil, trailers)
		if len(data) > 0 {
			sent = append(appendChunk(nil, data), sent...)
		}
		data2, trailers2, rest2, done2, err2 = readChunks(sent, nil, maxHead)
		if !bytes.Equal(data, data2) || !bytes.Equal(trailers, trailers2) || len(rest2) > 0 || !done2 || err2 != nil {
			t.Errorf("%q goes on as %q: another body", wire, sent)
		}
	})
}

// FuzzVisible holds the eight bytes at a time against the loop over bytes.
func FuzzVisible(f *testing.F) {
	for c := range 256 {
		f.Add([]byte{'a', 'b', 'c', byte(c), 'e', 'f', 'g', 'h', 'i'})
	}
	f.Add([]byte("\t\t\t\t\t\t\t\t\t\x80\xff\x9f\xa0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		want := true
		for _, c := range b {
			want = want && (c >= 0x20 && c != 0x7f || c == '\t')
		}
		for i := range 8 { // at every place within a word
			if got := visible(append(bytes.Repeat([]byte("x"), i), b...)); got != want {
				t.Fatalf("visible(%d x, %q) is %v", i, b, got)
			}
		}
	})
}

// FuzzHost: what we take for a host net/url takes too, with nothing before or behind it, and reads as the same bytes.
func FuzzHost(f *testing.F) {
	for _, seed := range []string{"a", "a:80", "a:", "[::1]", "[::1]:8080", "[::ffff:1.2.3.4]", "a.b-c_d~e", "!$&'()*+;=", "u@a", "a/b", "a%41", "[::1%25eth0]", "a:65536", "[a]", ":80", "::1", "a\\b", "a?b", "1.2.3.4", "a:080"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if !validHost(b) {
			return
		}
		u, err := url.Parse("http://" + string(b) + "/x")
		if err != nil || u.Host != string(b) || u.User != nil || u.Path != "/x" || u.RawQuery != "" || u.Hostname() == "" {
			t.Fatalf("%q: net/url reads %+v, %v", b, u, err)
		}
		if port := u.Port(); port != "" {
			if _, err := strconv.ParseUint(port, 10, 16); err != nil {
				t.Fatalf("%q has the port %q", b, port)
			}
		}
		if strings.ContainsAny(string(b), "[]") {
			if ip, err := netip.ParseAddr(u.Hostname()); err != nil || !ip.Is6() || ip.Zone() != "" {
				t.Fatalf("%q has the address %q", b, u.Hostname())
			}
		}
	})
}

// node is parseNode by other means.
func node(entry string) (netip.Addr, bool) {
	host, port, err := net.SplitHostPort(entry)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(entry, "["), "]"), "0"
		if len(host) != len(entry) && "["+host+"]" != entry {
			return netip.Addr{}, false
		}
	}
	addr, err := netip.ParseAddr(host)
	_, portErr := strconv.ParseUint(port, 10, 16)
	return addr.Unmap(), err == nil && portErr == nil && addr.Zone() == "" && (entry[0] != '[' || addr.Is6())
}

// FuzzForwardedFor holds the walk over X-Forwarded-For against one over a plain list of entries.
func FuzzForwardedFor(f *testing.F) {
	for _, seed := range []string{"1.2.3.4", "10.0.0.1", "1.2.3.4, 10.0.0.1\n10.0.0.2", "[::1]:80,10.1.1.1:5", "::ffff:10.0.0.1\n,", "unknown, 10.0.0.1",
		"fe80::1%eth0, 10.0.0.1", "[1.2.3.4]", "[1.2.3.4]:80", "10.0.0.1,,10.0.0.1", "_hidden", "\"1.2.3.4\"", "1.2.3.4:", "[::1", "10.0.0.1 10.0.0.2", "fd00::1:80"} {
		f.Add(seed)
	}
	p, err := New(Config{Registry: registry.New(registry.Config{}), TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(p.Close)
	peer := netip.MustParseAddr("10.9.9.9")
	f.Fuzz(func(t *testing.T, values string) {
		head := "GET / HTTP/1.1\r\nHost: a\r\n"
		var entries []string
		lines := strings.Split(values, "\n")
		for _, line := range lines {
			head += "X-Forwarded-For: " + line + "\r\n"
			if line = strings.Trim(line, " \t"); line != "" {
				entries = append(entries, strings.Split(strings.TrimPrefix(line, ","), ",")...)
			}
		}
		var r Request
		if r.parse([]byte(head+"\r\n"), nil, true, &standard) != nil || len(r.xff) != len(lines) {
			return
		}
		want := peer
		for _, entry := range slices.Backward(entries) {
			addr, ok := node(strings.Trim(entry, " \t"))
			if !ok {
				break
			}
			if want = addr; !p.trusts(addr) {
				break
			}
		}
		if got := p.client(&r, peer); got != want {
			t.Fatalf("%q gives %v, want %v", values, got, want)
		}
	})
}

// FuzzAccept: it makes no difference in how many lines members stand, nor in which order.
func FuzzAccept(f *testing.F) {
	for _, seed := range []string{"application/json", "application/json;q=0.5,*/*;q=0.1", "text/*;q=1.000,application/a+json;q=0", "a/b;c=d;q=0.001", "*/*", "text/plain,application/json;q=2", ","} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		if strings.ContainsAny(value, "\r\n") {
			return
		}
		members := strings.Split(value, ",")
		slices.Reverse(members)
		one := Request{lines: []byte("Accept: " + value + "\r\n")}
		many := Request{lines: []byte("Accept: " + strings.Join(members, "\r\naccept:") + "\r\n")}
		if a, b := one.prefersJSON(), many.prefersJSON(); a != b {
			t.Fatalf("%q: %v in one line, %v in many", value, a, b)
		}
		for _, member := range members {
			name, weight, ok := mediaRange([]byte(strings.Trim(member, " \t")))
			if kind, _, err := mime.ParseMediaType(string(name)); ok && (err != nil || !strings.EqualFold(kind, string(name)) || weight < 0 || weight > 1000) {
				t.Fatalf("%q is %q of %d, mime reads %q, %v", member, name, weight, kind, err)
			}
		}
	})
}
