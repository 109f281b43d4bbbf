package wire

import (
	"fmt"
	"strings"
	"time"
)

// Sections, in the order of the table.
const (
	heads       = "Request heads"
	lengths     = "Request framing"
	chunks      = "Chunked requests"
	targets     = "Targets and hosts"
	limits      = "Limits"
	responses   = "Responses"
	streams     = "Streaming"
	upgrades    = "Upgrades"
	connections = "Connections"
)

// Sections returns the sections of the table in their order.
func Sections() []string {
	return []string{heads, lengths, chunks, targets, limits, responses, streams, upgrades, connections}
}

const (
	host  = "Host: wire.test\r\n"
	line  = "GET {p}/a HTTP/1.1\r\n"
	extra = "GET {p}/smuggled HTTP/1.1\r\n" + host + "\r\n" // what nobody sent as a request, or sent behind one that ends the connection
)

// get is a GET with fields.
func get(fields string) string { return line + host + fields + "\r\n" }

// post is a POST; its body is what follows.
func post(fields, body string) string {
	return "POST {p}/a HTTP/1.1\r\n" + host + fields + "\r\n" + body
}

func chunked(body string) string { return post("Transfer-Encoding: chunked\r\n", body) }

// one is a row whose client sends some bytes at once.
func one(section, id string, level Level, source, says, request string, want verdict) Case {
	return Case{ID: id, Section: section, Level: level, Source: source, Says: says, Client: []step{send(request)}, Want: want}
}

// Cases returns the table.
func Cases() []Case {
	var all []Case
	for _, part := range [][]Case{headCases(), lengthCases(), chunkCases(), targetCases(), limitCases(), responseCases(), streamCases(), upgradeCases(), connectionCases()} {
		all = append(all, part...)
	}
	return all
}

func headCases() []Case {
	// refuse is a row that leaves no choice; what follows on the connection must not be looked at.
	refuse := func(id string, level Level, source, request string, statuses ...int) Case {
		return one(heads, id, level, source, "refused and closed", request+extra, refused(append(statuses, 400)...))
	}
	// choice is a row that may be forwarded too, if it is without what is wrong with it.
	choice := func(id string, level Level, source, request string, checks ...check) Case {
		return one(heads, id, level, source, "refused, or forwarded repaired", request, either(refused(400), forwarded(checks...)))
	}
	keep := func(id string, level Level, source, says, request string, checks ...check) Case {
		return one(heads, id, level, source, says, request, both(forwarded(checks...), stays))
	}
	return []Case{
		choice("lf-head", Must, "RFC 9112 2.2", "GET {p}/a HTTP/1.1\nHost: wire.test\nX-A: 1\n\n"),
		choice("lf-field", Must, "RFC 9112 2.2", get("X-A: 1\nX-B: 2\r\n")),
		choice("lf-start", Must, "RFC 9112 2.2", "GET {p}/a HTTP/1.1\n"+host+"\r\n"),
		choice("lf-end", Must, "RFC 9112 2.2", line+host+"\n"),
		choice("lf-content-length", Must, "RFC 9112 2.2", "POST {p}/a HTTP/1.1\r\n"+host+"X-A: 1\nContent-Length: 3\r\n\r\nabc", body("abc")),
		choice("cr-value", Must, "RFC 9112 2.2", get("X-A: a\rb\r\n")),
		choice("cr-field", Must, "RFC 9112 2.2", get("X-A: a\rX-B: b\r\n"), lacks("X-B")),
		choice("cr-content-length", Must, "RFC 9112 2.2", get("X-A: a\rContent-Length: 5\r\n"), lacks("Content-Length")),
		choice("cr-transfer-encoding", Must, "RFC 9112 2.2", get("X-A: a\rTransfer-Encoding: chunked\r\n"), lacks("Transfer-Encoding")),
		refuse("cr-name", Must, "RFC 9112 5.1", get("X\r-A: a\r\n")),
		refuse("cr-start", Must, "RFC 9112 2.2", "GET {p}/a\rHTTP/1.1\r\n"+host+"\r\n"),
		choice("cr-end", Must, "RFC 9112 2.2", get("X-A: a\r\r\n")),
		choice("cr-lf-cr", Must, "RFC 9112 2.2", get("X-A: a\r\n\rX-B: b\r\n"), lacks("X-B")),
		choice("fold", Must, "RFC 9112 5.2", get("X-A: a\r\n b\r\n")),
		choice("fold-tab", Must, "RFC 9112 5.2", get("X-A: a\r\n\tb\r\n")),
		choice("fold-host", Must, "RFC 9112 5.2", line+"Host:\r\n wire.test\r\n\r\n", has("Host", "wire.test")),
		choice("fold-first", Must, "RFC 9112 2.2", line+" X-A: 1\r\n"+host+"\r\n", lacks("X-A")),
		choice("fold-smuggle", Must, "RFC 9112 5.2", get("X-A: a\r\n Content-Length: 5\r\n"), lacks("Content-Length")),
		refuse("space-colon", Must, "RFC 9112 5.1", get("X-A : 1\r\n")),
		refuse("tab-colon", Must, "RFC 9112 5.1", get("X-A\t: 1\r\n")),
		refuse("space-colon-length", Must, "RFC 9112 5.1", post("Content-Length : 3\r\n", "abc")),
		refuse("space-colon-coding", Must, "RFC 9112 5.1", post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n")),
		refuse("space-colon-host", Must, "RFC 9112 5.1", line+"Host : wire.test\r\n\r\n"),
		choice("name-space", Should, "RFC 9110 5.1", get("X A: 1\r\n"), lacks("X A")),
		choice("name-nul", Must, "RFC 9110 5.1", get("X\x00A: 1\r\n")),
		choice("name-control", Must, "RFC 9110 5.1", get("X\x01A: 1\r\n")),
		choice("name-high", Must, "RFC 9110 5.1", get("X\xe4A: 1\r\n")),
		choice("name-empty", Must, "RFC 9110 5.1", get(": 1\r\n")),
		choice("name-quoted", Must, "RFC 9110 5.1", get("\"X-A\": 1\r\n")),
		choice("no-colon", Must, "RFC 9112 5", get("garbage\r\n")),
		choice("value-nul", Must, "RFC 9110 5.5", get("X-A: a\x00b\r\n")),
		choice("value-control", Should, "RFC 9110 5.5", get("X-A: a\x01b\r\n")),
		keep("value-high", Should, "RFC 9110 5.5", "forwarded byte for byte", get("X-A: \xe4\xff\r\n"), has("X-A", "\xe4\xff")),
		keep("value-tab", Should, "RFC 9110 5.5", "forwarded byte for byte", get("X-A: a\tb\r\n"), has("X-A", "a\tb")),
		keep("value-empty", Must, "RFC 9112 5", "forwarded", get("X-A:\r\n"), has("X-A", "")),
		keep("value-trim", Must, "RFC 9112 5", "forwarded without the white space around it", get("X-A: \t a b\t \r\n"), has("X-A", "a b")),
		keep("lines-repeat", Must, "RFC 9110 5.3", "forwarded in order", get("X-A: 1\r\nX-A: 2\r\n"), func(_ *Case, r *request) error {
			if got := strings.Join(r.values("X-A"), ", "); got != "1, 2" {
				return fmt.Errorf("forwarded with X-A %q", got)
			}
			return nil
		}),
		{ID: "drip", Section: heads, Level: Must, Source: "RFC 9112 2.2", Says: "read however it arrives",
			Client: []step{drip(get("X-A: 1\r\n"))}, Want: both(forwarded(has("X-A", "1")), stays)},
		keep("crlf-first", Should, "RFC 9112 2.2", "an empty line before the request is ignored", "\r\n"+get("")),

		choice("version-1.2", Must, "RFC 9112 2.3", "GET {p}/a HTTP/1.2\r\n"+host+"\r\n").but(either(refused(400, 505), forwarded())),
		refuse("version-2.0", Must, "RFC 9110 15.6.6", "GET {p}/a HTTP/2.0\r\n"+host+"\r\n", 505),
		refuse("version-3.0", Must, "RFC 9110 15.6.6", "GET {p}/a HTTP/3.0\r\n"+host+"\r\n", 505),
		refuse("version-0.9", Must, "RFC 9110 15.6.6", "GET {p}/a HTTP/0.9\r\n"+host+"\r\n", 505),
		refuse("version-1.10", Must, "RFC 9112 2.3", "GET {p}/a HTTP/1.10\r\n"+host+"\r\n", 505),
		refuse("version-01.1", Must, "RFC 9112 2.3", "GET {p}/a HTTP/01.1\r\n"+host+"\r\n", 505),
		refuse("version-case", Must, "RFC 9112 2.3", "GET {p}/a http/1.1\r\n"+host+"\r\n", 505),
		refuse("version-sign", Must, "RFC 9112 2.3", "GET {p}/a HTTP/1.+1\r\n"+host+"\r\n", 505),
		refuse("version-name", Must, "RFC 9112 2.3", "GET {p}/a HTTPS/1.1\r\n"+host+"\r\n", 505),
		refuse("version-more", Must, "RFC 9112 3", "GET {p}/a HTTP/1.1x\r\n"+host+"\r\n", 505),
		one(heads, "version-none", Should, "RFC 9112 3", "no HTTP/0.9", "GET {p}/a\r\n\r\n", func(c *Case, o *outcome) error {
			if o.closed && len(o.requests) == 0 {
				return nil // whatever was said: an HTTP/0.9 answer has no head
			}
			return refused(400, 505)(c, o)
		}),
		refuse("method-none", Must, "RFC 9112 3", " {p}/a HTTP/1.1\r\n"+host+"\r\n"),
		refuse("method-control", Must, "RFC 9110 9.1", "G\x01T {p}/a HTTP/1.1\r\n"+host+"\r\n", 405, 501),
		refuse("method-brackets", Must, "RFC 9110 9.1", "G(E)T {p}/a HTTP/1.1\r\n"+host+"\r\n", 405, 501),
		keep("method-unknown", Should, "RFC 9110 9.1", "forwarded", "BREW {p}/a HTTP/1.1\r\n"+host+"\r\n", method("BREW")),
		one(heads, "method-case", Must, "RFC 9110 9.1", "methods have a case: forwarded as it is, or refused", "get {p}/a HTTP/1.1\r\n"+host+"\r\n",
			either(denied(400, 405, 501), forwarded(method("get")))),
		choice("start-two-spaces", Must, "RFC 9112 3", "GET  {p}/a HTTP/1.1\r\n"+host+"\r\n", target("{p}/a")),
		choice("start-tab", Must, "RFC 9112 3", "GET\t{p}/a HTTP/1.1\r\n"+host+"\r\n", target("{p}/a")),
		choice("start-space-end", Must, "RFC 9112 3", "GET {p}/a HTTP/1.1 \r\n"+host+"\r\n", target("{p}/a")),

		// fields that end here, and those that a gateway speaks in
		keep("hop-nominated", Must, "RFC 9110 7.6.1", "what Connection names is not forwarded", get("Connection: X-Hop\r\nX-Hop: 1\r\nX-End: 1\r\n"), lacks("X-Hop"), has("X-End", "1")),
		keep("hop-keep-alive", Must, "RFC 9110 7.6.1", "Keep-Alive and Proxy-Connection are not forwarded", get("Connection: keep-alive\r\nKeep-Alive: 300\r\nProxy-Connection: keep-alive\r\n"), lacks("Keep-Alive", "Proxy-Connection")),
		keep("hop-te", Must, "RFC 9110 10.1.4", "TE is not forwarded, or named in Connection", get("Connection: TE\r\nTE: gzip;q=0.5\r\n"), without("gzip;q=0.5")),
		keep("hop-host", Must, "hop-by-hop abuse, N. Davison 2019", "Connection cannot take Host away", get("Connection: Host\r\n"), has("Host", "wire.test")),
		one(heads, "hop-content-length", Must, "hop-by-hop abuse, N. Davison 2019", "Connection cannot take Content-Length away", post("Connection: Content-Length\r\nContent-Length: 3\r\n", "abc"),
			either(refused(400), forwarded(body("abc")))),
		keep("shadow-forwarded-for", Should, "CGI, RFC 3875 4.1.18", "names with _ that are read as ours are dropped", get("X_Forwarded_For: 6.6.6.6\r\n"), without("6.6.6.6")),
		keep("shadow-content-length", Should, "CGI, RFC 3875 4.1.18", "names with _ that are read as framing are dropped", get("Content_Length: 5\r\n"), lacks("Content_Length")),
		keep("shadow-transfer-encoding", Should, "CGI, RFC 3875 4.1.18", "names with _ that are read as framing are dropped", get("Transfer_Encoding: chunked\r\n"), lacks("Transfer_Encoding")),
		keep("shadow-none", Should, "RFC 9110 5.1", "other names with _ are forwarded", get("x_a: 1\r\n"), has("x_a", "1")),
		one(heads, "max-forwards-0", Must, "RFC 9110 7.6.2", "answered here", "OPTIONS {p}/a HTTP/1.1\r\n"+host+"Max-Forwards: 0\r\n\r\n", denied(200, 204)),
		one(heads, "max-forwards-2", Must, "RFC 9110 7.6.2", "forwarded with one less", "OPTIONS {p}/a HTTP/1.1\r\n"+host+"Max-Forwards: 2\r\n\r\n", forwarded(has("Max-Forwards", "1"))),
		one(heads, "http10", Must, "RFC 9112 9.3", "answered and closed", "GET {p}/a HTTP/1.0\r\n"+host+"\r\n", both(forwarded(), closes)),
		one(heads, "http10-no-host", Must, "RFC 9112 3.2", "answered and closed; the origin gets one Host if it is asked in HTTP/1.1", "GET {p}/a HTTP/1.0\r\n\r\n", both(forwarded(), closes)),
		one(heads, "close", Must, "RFC 9112 9.6", "answered and closed", get("Connection: close\r\n"), both(forwarded(), closes)),
		one(heads, "close-pipelined", Must, "RFC 9112 9.6", "what follows a close is not looked at", get("Connection: close\r\n")+extra, both(forwarded(), closes)),
		one(heads, "close-case", Must, "RFC 9110 7.6.1", "options have no case, and may stand in a list", get("Connection: x, CLOSE\r\n"), both(forwarded(), closes)),
	}
}

// should returns the case as one of less weight.
func (c Case) should() Case {
	c.Level = Should
	return c
}

// but returns the case with another verdict.
func (c Case) but(want verdict) Case {
	c.Want = want
	return c
}

func lengthCases() []Case {
	refuse := func(id, source, request string, statuses ...int) Case {
		return one(lengths, id, Must, source, "refused and closed", request+extra, refused(append(statuses, 400)...))
	}
	choice := func(id, source, says, request string, checks ...check) Case {
		return one(lengths, id, Must, source, says, request, either(refused(400, 422, 501), forwarded(checks...)))
	}
	const (
		coded = "0\r\n\r\n"
		te    = "Transfer-Encoding: chunked\r\n"
	)
	// both fields: the length must not win, and the connection ends in any case.
	both1 := func(id, source, fields string) Case {
		return one(lengths, id, Must, source, "refused, or read as chunked and closed", post(fields, "3\r\nabc\r\n0\r\n\r\n"+extra),
			either(refused(400, 501), both(forwarded(body("abc"), lacks("Content-Length")), closes)))
	}
	return []Case{
		both1("cl-te", "RFC 9112 6.3", "Content-Length: 4\r\n"+te),
		both1("te-cl", "RFC 9112 6.3", te+"Content-Length: 4\r\n"),
		both1("cl-te-0", "RFC 9112 6.3", "Content-Length: 0\r\n"+te),
		both1("cl-te-right", "RFC 9112 6.3", "Content-Length: 13\r\n"+te),
		both1("cl-te-case", "RFC 9112 6.3", "content-length: 4\r\ntransfer-encoding: CHUNKED\r\n"),
		refuse("cl-two", "RFC 9112 6.3", post("Content-Length: 3\r\nContent-Length: 4\r\n", "abcd")),
		refuse("cl-two-apart", "RFC 9112 6.3", post("Content-Length: 3\r\nX-A: 1\r\ncontent-length: 0\r\n", "abc")),
		choice("cl-two-same", "RFC 9112 6.3", "refused, or forwarded with one", post("Content-Length: 3\r\nContent-Length: 3\r\n", "abc"), body("abc")),
		refuse("cl-list", "RFC 9112 6.3", post("Content-Length: 3, 4\r\n", "abcd")),
		choice("cl-list-same", "RFC 9112 6.3", "refused, or forwarded with one", post("Content-Length: 3, 3\r\n", "abc"), body("abc")),
		refuse("cl-list-open", "RFC 9110 8.6", post("Content-Length: 3,\r\n", "abc")),
		refuse("cl-plus", "RFC 9110 8.6", post("Content-Length: +3\r\n", "abc")),
		refuse("cl-minus", "RFC 9110 8.6", post("Content-Length: -3\r\n", "abc")),
		refuse("cl-minus-zero", "RFC 9110 8.6", post("Content-Length: -0\r\n", "")),
		refuse("cl-space", "RFC 9110 8.6", post("Content-Length: 3 3\r\n", "abc")),
		refuse("cl-hex", "RFC 9110 8.6", post("Content-Length: 0x3\r\n", "abc")),
		refuse("cl-letter", "RFC 9110 8.6", post("Content-Length: 3a\r\n", "abc")),
		refuse("cl-garbage-first", "RFC 9110 8.6", post("Content-Length: a3\r\n", "abc")),
		refuse("cl-point", "RFC 9110 8.6", post("Content-Length: 3.0\r\n", "abc")),
		refuse("cl-underscore", "Go issue 34540", post("Content-Length: 1_0\r\n", "0123456789")),
		refuse("cl-empty", "RFC 9110 8.6", post("Content-Length:\r\n", "abc")),
		refuse("cl-vt", "RFC 9110 8.6", post("Content-Length: \v3\r\n", "abc")),
		refuse("cl-nul", "RFC 9110 8.6", post("Content-Length: 3\x00\r\n", "abc")),
		refuse("cl-fullwidth", "RFC 9110 8.6", post("Content-Length: \xef\xbc\x93\r\n", "abc")),
		refuse("cl-overflow", "RFC 9110 8.6", post("Content-Length: 18446744073709551619\r\n", "abc"), 413),
		choice("cl-zero-first", "RFC 9110 8.6", "refused, or forwarded in one form", post("Content-Length: 003\r\n", "abc"), body("abc")),
		one(lengths, "cl-0", Must, "RFC 9110 8.6", "forwarded", post("Content-Length: 0\r\n", ""), both(forwarded(body("")), stays)),
		one(lengths, "cl-get", Must, "RFC 9110 9.3.1", "the body of a GET is never read as a request", get(fmt.Sprintf("Content-Length: %d\r\n", len(extra)-len("{p}")+len(prefix+"cl-get")))+extra,
			either(refused(400, 413), forwarded(body(strings.ReplaceAll(extra, "{p}", prefix+"cl-get"))))),
		one(lengths, "cl-bodyless", Must, "RFC 9112 6.3", "a POST without a length has no body", post("", ""), both(either(denied(400, 411), forwarded(body(""))))),
		{ID: "cl-short", Section: lengths, Level: Must, Source: "RFC 9112 8", Says: "a request that breaks off never reaches the origin as a whole",
			Client: []step{send(post("Content-Length: 10\r\n", "abc")), pause(50 * time.Millisecond), halfClose}, Want: stopped},

		refuse("te-unknown", "RFC 9112 6.1", post("Transfer-Encoding: foo\r\n", coded), 422, 501),
		refuse("te-gzip", "RFC 9112 6.3", post("Transfer-Encoding: gzip\r\n", coded), 422, 501),
		refuse("te-identity", "RFC 9112 7", post("Transfer-Encoding: identity\r\n", coded), 422, 501),
		refuse("te-chunked-identity", "RFC 9112 6.1", post("Transfer-Encoding: chunked, identity\r\n", coded), 422, 501),
		refuse("te-gzip-chunked", "RFC 9112 6.1", post("Transfer-Encoding: gzip, chunked\r\n", coded), 422, 501).should(),
		refuse("te-chunked-gzip", "RFC 9112 6.3", post("Transfer-Encoding: chunked, gzip\r\n", coded), 422, 501),
		refuse("te-list-twice", "RFC 9112 6.1", post("Transfer-Encoding: chunked, chunked\r\n", coded), 422, 501),
		refuse("te-twice", "RFC 9112 6.1", post(te+te, coded), 422, 501),
		refuse("te-twice-identity", "RFC 9112 6.1", post(te+"Transfer-Encoding: identity\r\n", coded), 422, 501),
		refuse("te-identity-first", "RFC 9112 6.1", post("Transfer-Encoding: identity\r\n"+te, coded), 422, 501),
		refuse("te-x", "CVE-2019-18860 and others", post("Transfer-Encoding: xchunked\r\n", coded), 422, 501),
		refuse("te-chunkedx", "RFC 9112 6.1", post("Transfer-Encoding: chunkedx\r\n", coded), 422, 501),
		refuse("te-vt", "CVE-2019-18277", post("Transfer-Encoding: \vchunked\r\n", coded), 422, 501),
		refuse("te-nul", "RFC 9110 5.5", post("Transfer-Encoding: chunked\x00\r\n", coded), 422, 501),
		refuse("te-quoted", "RFC 9112 6.1", post("Transfer-Encoding: \"chunked\"\r\n", coded), 422, 501),
		refuse("te-parameter", "RFC 9112 7.1", post("Transfer-Encoding: chunked;q=1\r\n", coded), 422, 501),
		refuse("te-space-inside", "RFC 9112 6.1", post("Transfer-Encoding: chun ked\r\n", coded), 422, 501),
		refuse("te-empty", "RFC 9112 6.1", post("Transfer-Encoding:\r\n", coded), 422, 501),
		refuse("te-kelvin", "CVE-2022-32215 and others", post("Transfer-Encoding: chun\xe2\x84\xaaed\r\n", coded), 422, 501), // a Kelvin sign is a k in lower case
		choice("te-comma", "RFC 9110 5.6.1", "refused, or read as chunked", post("Transfer-Encoding: ,chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), body("abc")),
		choice("te-fold", "RFC 9112 5.2", "refused, or read as chunked", post("Transfer-Encoding:\r\n chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), body("abc")),
		choice("te-lf", "RFC 9112 2.2", "refused, or read as chunked", post("X-A: 1\nTransfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), body("abc")),
		one(lengths, "te-case", Must, "RFC 9112 7", "codings have no case", post("Transfer-Encoding: Chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), both(forwarded(body("abc")), stays)),
		one(lengths, "te-white-space", Must, "RFC 9112 5", "white space around it means nothing", post("Transfer-Encoding: \tchunked \t\r\n", "3\r\nabc\r\n0\r\n\r\n"), both(forwarded(body("abc")), stays)),
		one(lengths, "te-10", Must, "RFC 9112 6.1", "refused, or read as chunked and closed", "POST {p}/a HTTP/1.0\r\n"+host+"Connection: keep-alive\r\n"+te+"\r\n3\r\nabc\r\n0\r\n\r\n"+extra,
			either(refused(400, 501), both(forwarded(body("abc")), closes))),
		one(lengths, "te-cl-10", Must, "RFC 9112 6.1", "refused, or read as chunked and closed", "POST {p}/a HTTP/1.0\r\n"+host+"Connection: keep-alive\r\nContent-Length: 4\r\n"+te+"\r\n3\r\nabc\r\n0\r\n\r\n"+extra,
			either(refused(400, 501), both(forwarded(body("abc"), lacks("Content-Length")), closes))),
		one(lengths, "te-get", Must, "RFC 9110 9.3.1", "the body of a GET is never read as a request", get(te)+"0\r\n\r\n", either(refused(400, 413), forwarded(body("")))),
	}
}

func chunkCases() []Case {
	// refuse is a body that is malformed: the origin gets it not at all, or sees it break off.
	refuse := func(id, source, body string) Case {
		return one(chunks, id, Must, source, "refused and closed; the origin never sees it as whole", chunked(body+extra), stopped)
	}
	// overflow is a size that is read as 5 where it is cut off; it may be waited for.
	overflow := func(id, source, size string) Case {
		return Case{ID: id, Section: chunks, Level: Must, Source: source, Says: "refused, or read as the size that it is",
			Client: []step{send(chunked(size + "\r\nhello\r\n0\r\n\r\n" + extra)), pause(50 * time.Millisecond), halfClose}, Want: stopped}
	}
	choice := func(id, source, sent string, repaired verdict) Case {
		return Case{ID: id, Section: chunks, Level: Must, Source: source, Says: "refused, or forwarded repaired",
			Client: []step{send(chunked(sent)), pause(100 * time.Millisecond), halfClose}, Want: anyOf(stopped, repaired)}
	}
	keep := func(id, source, says, sent string, checks ...check) Case {
		return one(chunks, id, Must, source, says, chunked(sent), both(forwarded(append(checks, body("hello"))...), stays))
	}
	const end = "\r\n0\r\n\r\n"
	return []Case{
		keep("chunks", "RFC 9112 7.1", "forwarded", "2\r\nhe\r\n3\r\nllo"+end),
		keep("chunk-zeros", "RFC 9112 7.1", "forwarded", "00005\r\nhello"+end),
		keep("chunk-extension", "RFC 9112 7.1.1", "forwarded", "5;a=b\r\nhello"+end),
		keep("chunk-extension-quoted", "RFC 9112 7.1.1", "forwarded", "5;a=\"b;c\"\r\nhello"+end),
		refuse("chunk-words", "RFC 9112 7.1", "xyz\r\nhello"+end),
		refuse("chunk-minus", "RFC 9112 7.1", "-5\r\nhello"+end),
		refuse("chunk-plus", "RFC 9112 7.1", "+5\r\nhello"+end),
		refuse("chunk-0x", "RFC 9112 7.1", "0x5\r\nhello"+end),
		refuse("chunk-space-first", "RFC 9112 7.1", " 5\r\nhello"+end),
		refuse("chunk-underscore", "RFC 9112 7.1", "0_5\r\nhello"+end),
		refuse("chunk-empty", "RFC 9112 7.1", "\r\nhello"+end),
		refuse("chunk-semicolon", "RFC 9112 7.1", ";a\r\nhello"+end),
		overflow("chunk-overflow-32", "RFC 9112 7.1", "100000005"),
		overflow("chunk-overflow-64", "RFC 9112 7.1", "10000000000000005"),
		overflow("chunk-overflow-sign", "CVE-2013-2028", "fffffffffffffff5"),
		choice("chunk-many-digits", "RFC 9112 7.1", strings.Repeat("0", 5000)+"5\r\nhello"+end, forwarded(body("hello"))),
		refuse("chunk-lf-size", "RFC 9112 7.1", "5\nhello"+end),
		refuse("chunk-lf-data", "RFC 9112 7.1", "5\r\nhello\n0\r\n\r\n"),
		refuse("chunk-lf-last", "RFC 9112 7.1", "5\r\nhello\r\n0\n\r\n"),
		refuse("chunk-lf-end", "RFC 9112 7.1", "5\r\nhello\r\n0\r\n\n"),
		refuse("chunk-cr-size", "RFC 9112 7.1", "5\rhello"+end),
		refuse("chunk-cr-data", "RFC 9112 7.1", "5\r\nhello\r0\r\n\r\n"),
		refuse("chunk-cr-twice", "RFC 9112 7.1", "5\r\r\nhello"+end),
		refuse("chunk-longer", "RFC 9112 7.1", "5\r\nhello!"+end),
		refuse("chunk-longer-two", "RFC 9112 7.1", "5\r\nhelloXX0\r\n\r\n"),
		refuse("chunk-nul", "RFC 9112 7.1", "5\x00\r\nhello"+end),
		refuse("chunk-extension-lf", "TE.TE, J. Kettle 2025; CVE-2025-22871", "5;\nhello\r\n0\r\n\r\n"),
		refuse("chunk-extension-lf-2", "CVE-2025-22871", "5;a\nb\r\nhello"+end),
		refuse("chunk-extension-cr", "RFC 9112 7.1.1", "5;a\rb\r\nhello"+end),
		refuse("chunk-extension-nul", "RFC 9112 7.1.1", "5;a\x00b\r\nhello"+end).should(),
		choice("chunk-trailer-lf", "RFC 9112 7.1.2", "5\r\nhello\r\n0\r\nX-A: 1\n\r\n", forwarded(body("hello"))),
		choice("chunk-trailer-no-colon", "RFC 9112 7.1.2", "5\r\nhello\r\n0\r\ngarbage\r\n\r\n", forwarded(body("hello"))),
		choice("chunk-trailer-space", "RFC 9112 5.1", "5\r\nhello\r\n0\r\nX-A : 1\r\n\r\n", forwarded(body("hello"), lacks("X-A"))),
		{ID: "chunk-cut", Section: chunks, Level: Must, Source: "RFC 9112 8", Says: "a request that breaks off never reaches the origin as a whole",
			Client: []step{send(chunked("5\r\nhel")), pause(50 * time.Millisecond), halfClose}, Want: stopped},
		{ID: "chunk-cut-last", Section: chunks, Level: Must, Source: "RFC 9112 8", Says: "a request without its last chunk never reaches the origin as a whole",
			Client: []step{send(chunked("5\r\nhello\r\n")), pause(50 * time.Millisecond), halfClose}, Want: stopped},
		{ID: "chunk-late", Section: chunks, Level: Must, Source: "RFC 9112 7.1", Says: "refused also if the fault comes late",
			Client: []step{send(chunked("5\r\nhello\r\n")), pause(50 * time.Millisecond), send("zz\r\n" + extra)}, Want: stopped},
		{ID: "chunk-drip", Section: chunks, Level: Must, Source: "RFC 9112 7.1", Says: "read however it arrives",
			Client: []step{drip(chunked("2;a=b\r\nhe\r\n3\r\nllo" + end))}, Want: both(forwarded(body("hello")), stays)},
		keep("trailer", "RFC 9110 6.5", "the body arrives, the trailer or not", "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"),
		one(chunks, "trailer-framing", Must, "RFC 9110 6.5.1", "refused, or forwarded without what frames or routes", chunked("5\r\nhello\r\n0\r\nContent-Length: 3\r\nTransfer-Encoding: x\r\nHost: evil\r\n\r\n"),
			anyOf(stopped, forwarded(body("hello"), without("evil"), noTrailer("Content-Length", "Transfer-Encoding", "Host")))),
		one(chunks, "trailer-forwarded", Should, "RFC 9110 6.5", "the trailer arrives", post("Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"), forwarded(body("hello"), trailer("X-Sum", "1"))),
		one(chunks, "trailer-unannounced", Should, "RFC 9110 6.5", "the trailer arrives", chunked("5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"), forwarded(body("hello"), trailer("X-Sum", "1"))),
	}
}

// noTrailer wants none of these behind the body.
func noTrailer(names ...string) check {
	return func(_ *Case, r *request) error {
		for _, f := range r.trailers {
			for _, name := range names {
				if strings.EqualFold(f.Name, name) {
					return fmt.Errorf("forwarded with the trailer %s", f.Name)
				}
			}
		}
		return nil
	}
}

func targetCases() []Case {
	at := func(target string) string { return "GET " + target + " HTTP/1.1\r\n" + host + "\r\n" }
	refuse := func(id string, level Level, source, request string, statuses ...int) Case {
		return one(targets, id, level, source, "refused and closed", request+extra, refused(append(statuses, 400)...))
	}
	// exact is a target that arrives byte for byte.
	exact := func(id string, level Level, source, path string) Case {
		return one(targets, id, level, source, "forwarded byte for byte", at(path), both(forwarded(target(path)), stays))
	}
	// careful is a target that may be refused too.
	careful := func(id string, level Level, source, path string) Case {
		return one(targets, id, level, source, "forwarded byte for byte, or refused", at(path), either(denied(400, 403, 404), forwarded(target(path))))
	}
	// absolute is a target in absolute-form.
	absolute := func(id, request, path, authority string) Case {
		return one(targets, id, Must, "RFC 9112 3.2.2", "forwarded in origin-form, with the target's authority as Host", request, forwarded(target(path), has("Host", authority)))
	}
	return []Case{
		refuse("target-space", Must, "RFC 9112 3.2", at("{p}/a b")),
		refuse("target-nul", Must, "RFC 9112 3.2", at("{p}/a\x00")),
		refuse("target-del", Must, "RFC 9112 3.2", at("{p}/a\x7f")),
		refuse("target-control", Must, "RFC 9112 3.2", at("{p}/a\x01")),
		refuse("target-control-query", Must, "RFC 9112 3.2", at("{p}/a?\x1f")),
		refuse("target-tab", Must, "RFC 9112 3.2", at("{p}/a\tb")),
		refuse("target-fragment", Should, "RFC 9112 3.2", at("{p}/a#f")),
		refuse("target-no-slash", Must, "RFC 9112 3.2", at("wire/a")),
		refuse("target-query-alone", Must, "RFC 9112 3.2", at("?a")),
		one(targets, "target-asterisk", Must, "RFC 9112 3.2.4", "refused", at("*"), denied(400, 404, 405)),
		exact("path-escapes", Must, "RFC 3986 2.1", "{p}/%20%e2%82%ac%2B"),
		exact("path-case", Must, "RFC 3986 6.2.2.1", "{p}/%aa%AA"),
		exact("path-reserved", Must, "RFC 3986 3.3", "{p}/a!$&'()*+,;=:@-._~"),
		exact("path-parameters", Must, "RFC 3986 3.3", "{p}/a;b=c/d"),
		exact("path-empty-segments", Must, "RFC 3986 3.3", "{p}//a//"),
		exact("path-dots", Should, "RFC 3986 3.3", "{p}/a/../b"),
		exact("path-dot", Should, "RFC 3986 3.3", "{p}/./a"),
		exact("path-encoded-dots", Should, "RFC 3986 2.3", "{p}/a/%2e%2e/b"),
		exact("path-encoded-slash", Must, "RFC 3986 2.2", "{p}/a%2fb%2Fc"),
		exact("path-encoded-backslash", Should, "RFC 3986 2.1", "{p}/a%5cb"),
		careful("path-backslash", Should, "RFC 3986 3.3", `{p}/a\b`),
		careful("path-encoded-nul", Must, "CWE-158", "{p}/a%00b"),
		careful("path-broken-escape", Must, "RFC 3986 2.1", "{p}/%zz%"),
		careful("path-high", Should, "RFC 3986 2", "{p}/\xc3\xa4\xff"),
		careful("path-invalid", Should, "RFC 3986 2", "{p}/a<b>\"{c}|^`"),
		careful("path-climbs", Must, "CWE-22", "{p}/../../../../etc/passwd").but(either(denied(400, 403, 404), forwarded(target("{p}/../../../../etc/passwd")))),
		careful("path-elsewhere", Must, "CWE-22", "{p}/../../other/a").but(either(denied(400, 403, 404), forwarded(target("{p}/../../other/a")))),
		careful("path-elsewhere-encoded", Must, "CWE-22", "{p}/%2e%2e/%2e%2E/other/a").but(either(denied(400, 403, 404), forwarded(target("{p}/%2e%2e/%2e%2E/other/a")))),
		careful("path-elsewhere-parameter", Must, "Breaking Parser Logic, O. Tsai 2018", "{p}/..;/..;a=b/other/a"),
		exact("query", Must, "RFC 3986 3.4", "{p}/a?b=c&d=%2e%2e/%2F?e;f"),
		exact("query-dots", Must, "RFC 3986 3.4", `{p}/a?../../other`),
		exact("query-empty", Should, "RFC 3986 3.4", "{p}/a?"),
		careful("query-high", Should, "RFC 3986 2", "{p}/a?\xe4"),
		exact("target-8000", Should, "RFC 9110 4.1", "{p}/"+strings.Repeat("a", 7900)),
		one(targets, "slashes-first", Must, "RFC 9112 3.2.1", "routed by the Host field", at("//evil.test{p}/../a"), either(denied(400, 404), forwarded(target("//evil.test{p}/../a"), has("Host", "wire.test")))),
		one(targets, "slashes-authority", Must, "RFC 9112 3.2.1", "routed by the Host field", at("//evil.test/..://{p}/a"), either(denied(400, 404), forwarded(target("//evil.test/..://{p}/a"), has("Host", "wire.test")))),

		absolute("absolute", "GET http://real.test{p}/a?b HTTP/1.1\r\nHost: real.test\r\n\r\n", "{p}/a?b", "real.test"),
		absolute("absolute-wins", "GET http://real.test{p}/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", "{p}/a", "real.test"),
		absolute("absolute-case", "GET HTTP://real.test{p}/a HTTP/1.1\r\nHost: real.test\r\n\r\n", "{p}/a", "real.test"),
		one(targets, "absolute-https", Should, "RFC 9112 3.2.2", "forwarded in origin-form, or refused", "GET https://real.test{p}/a HTTP/1.1\r\nHost: real.test\r\n\r\n",
			either(denied(400, 421), forwarded(target("{p}/a"), has("Host", "real.test")))),
		refuse("absolute-empty", Must, "RFC 9110 4.2.1", "GET http://{p}/a HTTP/1.1\r\n"+host+"\r\n"),
		refuse("absolute-port-alone", Must, "RFC 9110 4.2.1", "GET http://:80{p}/a HTTP/1.1\r\n"+host+"\r\n"),
		refuse("absolute-userinfo", Should, "RFC 9110 4.2.4", "GET http://u:p@real.test{p}/a HTTP/1.1\r\n"+host+"\r\n"),
		refuse("absolute-bad-port", Must, "RFC 3986 3.2.3", "GET http://real.test:a{p}/a HTTP/1.1\r\n"+host+"\r\n"),
		refuse("absolute-no-host", Must, "RFC 9112 3.2", "GET http://real.test{p}/a HTTP/1.1\r\n\r\n"),
		refuse("absolute-two-hosts", Must, "RFC 9112 3.2", "GET http://real.test{p}/a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
		one(targets, "absolute-ftp", Must, "RFC 9110 7.4", "refused", "GET ftp://real.test{p}/a HTTP/1.1\r\n"+host+"\r\n", denied(400, 403, 404, 421)),
		refuse("absolute-backslash", Must, "RFC 3986 3.2", `GET http://real.test\@evil.test{p}/a HTTP/1.1`+"\r\n"+host+"\r\n"),

		refuse("host-none", Must, "RFC 9112 3.2", line+"X-A: 1\r\n\r\n"),
		refuse("host-two", Must, "RFC 9112 3.2", line+"Host: a\r\nHost: b\r\n\r\n"),
		refuse("host-two-same", Must, "RFC 9112 3.2", line+"Host: a\r\nHost: a\r\n\r\n"),
		refuse("host-two-10", Must, "RFC 9112 3.2", "GET {p}/a HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
		refuse("host-list", Must, "RFC 9112 3.2", line+"Host: a, b\r\n\r\n"),
		refuse("host-userinfo", Must, "RFC 9110 7.2", line+"Host: u:p@a\r\n\r\n"),
		refuse("host-space", Must, "RFC 9110 7.2", line+"Host: a b\r\n\r\n"),
		refuse("host-path", Must, "RFC 9110 7.2", line+"Host: a/b\r\n\r\n"),
		refuse("host-query", Must, "RFC 9110 7.2", line+"Host: a?b\r\n\r\n"),
		refuse("host-fragment", Must, "RFC 9110 7.2", line+"Host: a#b\r\n\r\n"),
		refuse("host-backslash", Must, "RFC 9110 7.2", line+"Host: a\\b\r\n\r\n"),
		refuse("host-bad-port", Must, "RFC 9110 7.2", line+"Host: a:b\r\n\r\n"),
		refuse("host-bracket", Must, "RFC 9110 7.2", line+"Host: [::1\r\n\r\n"),
		refuse("host-nul", Must, "RFC 9110 7.2", line+"Host: a\x00b\r\n\r\n"),
		one(targets, "host-empty", Must, "RFC 9112 3.2", "refused, or forwarded with a Host", line+"Host:\r\n\r\n", either(refused(400), forwarded())),
		one(targets, "host-case", Should, "RFC 9110 7.2", "forwarded as it is", line+"Host: Wire.Test\r\n\r\n", forwarded(func(_ *Case, r *request) error {
			if !strings.EqualFold(r.value("Host"), "wire.test") {
				return fmt.Errorf("forwarded with Host %q", r.value("Host"))
			}
			return nil
		})),
		one(targets, "host-port", Should, "RFC 9110 7.2", "forwarded as it is", line+"Host: wire.test:8080\r\n\r\n", forwarded(has("Host", "wire.test:8080"))),
		one(targets, "host-ipv6", Should, "RFC 9110 7.2", "forwarded as it is", line+"Host: [::1]\r\n\r\n", forwarded(has("Host", "[::1]"))),
		one(targets, "connect", Should, "RFC 9110 9.3.6", "no tunnel", "CONNECT wire.test:443 HTTP/1.1\r\nHost: wire.test:443\r\n\r\n", denied(400, 403, 404, 405, 501)),
		one(targets, "connect-path", Should, "RFC 9110 9.3.6", "no tunnel", "CONNECT {p}/a HTTP/1.1\r\n"+host+"\r\n", denied(400, 403, 404, 405, 501)),
		one(targets, "trace", Should, "RFC 9110 9.3.8", "not allowed by default", "TRACE {p}/a HTTP/1.1\r\n"+host+"\r\n", denied(405, 501, 403, 400)),
		one(targets, "trace-body", Must, "RFC 9110 9.3.8", "no TRACE with a body", "TRACE {p}/a HTTP/1.1\r\n"+host+"Content-Length: 3\r\n\r\nabc", either(denied(405, 501, 403, 400), forwarded(body("")))),
		one(targets, "options-asterisk", Must, "RFC 9110 9.3.7", "answered here, or forwarded as it is", "OPTIONS * HTTP/1.1\r\n"+host+"\r\n", either(denied(200, 204, 400, 404, 405), forwarded(target("*"), method("OPTIONS")))),
		one(targets, "options-absolute", Should, "RFC 9112 3.2.4", "answered here, or forwarded as *", "OPTIONS http://wire.test HTTP/1.1\r\n"+host+"\r\n", either(denied(200, 204, 400, 404, 405), forwarded(target("*"), method("OPTIONS")))),
	}
}

func limitCases() []Case {
	const long = 2 << 20
	var many strings.Builder
	for range 5000 {
		many.WriteString("a:1\r\n")
	}
	// large is a head that no gateway takes; it need not be read to its end before it is refused.
	large := func(id, source, request string) Case {
		return one(limits, id, Must, source, "refused and closed", request, both(func(_ *Case, o *outcome) error {
			if len(o.requests) > 0 {
				return fmt.Errorf("forwarded %s", o.forms())
			}
			if !o.closed {
				return fmt.Errorf("%d, but the connection goes on", o.first().status)
			}
			if s := o.first().status; s != 0 {
				return o.answered([]int{400, 413, 414, 431})
			}
			return nil // its answer may be lost where much was not read
		}))
	}
	over := func(id string, says, request string, statuses ...int) Case {
		return one(limits, id, Should, "RFC 6585 5", says, request, refused(append(statuses, 400)...))
	}
	return []Case{
		large("head-2m", "RFC 6585 5", get("X-A: "+strings.Repeat("a", long)+"\r\n")),
		large("name-2m", "RFC 6585 5", get(strings.Repeat("a", long)+": 1\r\n")),
		large("target-2m", "RFC 9110 15.5.15", "GET {p}/"+strings.Repeat("a", long)+" HTTP/1.1\r\n"+host+"\r\n"),
		large("method-2m", "RFC 9112 3", strings.Repeat("A", long)+" {p}/a HTTP/1.1\r\n"+host+"\r\n").but(both(func(c *Case, o *outcome) error {
			if len(o.requests) > 0 || !o.closed {
				return fmt.Errorf("%d, %d forwarded", o.first().status, len(o.requests))
			}
			return nil
		})),
		over("head-64k", "refused with 431", get("X-A: "+strings.Repeat("a", 64<<10)+"\r\n"), 431),
		over("fields-5000", "refused with 431", get(many.String()), 431),
		over("line-24k", "refused with 414", "GET {p}/"+strings.Repeat("a", 24<<10)+" HTTP/1.1\r\n"+host+"\r\n", 414, 431),
		one(limits, "head-7k", Must, "RFC 9110 5.4", "forwarded", get("X-A: "+strings.Repeat("a", 7000)+"\r\n"), both(forwarded(has("X-A", strings.Repeat("a", 7000))), stays)),
		one(limits, "fields-60", Must, "RFC 9110 5.4", "forwarded", get(strings.Repeat("X-A: 1\r\n", 60)), both(forwarded(), stays)),
		one(limits, "body-1m", Must, "RFC 9110 8.6", "forwarded", post("Content-Length: 1000000\r\n", strings.Repeat("a", 1000000)), both(forwarded(body(strings.Repeat("a", 1000000))), stays)),
		one(limits, "chunk-extension-1m", Should, "CVE-2023-39326", "refused and closed", chunked("1;"+strings.Repeat("a", 1<<20)+"\r\nx\r\n0\r\n\r\n"), stopped),
		one(limits, "trailers-1m", Should, "RFC 6585 5", "refused and closed", chunked("1\r\nx\r\n0\r\n"+strings.Repeat("X-A: 1\r\n", 1<<17)+"\r\n"), stopped),
	}
}
