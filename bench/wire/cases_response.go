package wire

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	ok   = "HTTP/1.1 200 OK\r\n"
	evil = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nEVIL!" // what nobody asked for
)

// length is a response with a body and its length.
func length(body string) string {
	return fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", ok, len(body), body)
}

// from is a row whose origin answers one ordinary request with some bytes and goes on.
func from(id string, level Level, source, says, response string, want verdict) Case {
	return Case{ID: id, Section: responses, Level: level, Source: source, Says: says,
		Client: []step{send(get(""))}, Origin: [][]step{{readAll, send(response)}}, Want: want}
}

// ended returns the case with an origin that closes the connection behind its answer.
func (c Case) ended() Case {
	c.Origin = [][]step{append(slices.Clone(c.Origin[0]), hangUp)}
	return c
}

// to returns the case with another request.
func (c Case) to(method, request string) Case {
	c.Client, c.Methods = []step{send(request)}, []string{method}
	return c
}

func responseCases() []Case {
	// bad is a response that cannot be passed on.
	bad := func(id, source, response string) Case {
		return from(id, Must, source, "502", response, status(502)).ended()
	}
	// mend is one that may be passed on without what is wrong with it.
	mend := func(id, source, response string, checks ...judged) Case {
		return from(id, Must, source, "502, or passed on repaired", response, anyOf(status(502), passed(200, "hello", checks...))).ended()
	}
	pass := func(id string, level Level, source, says, response string, want verdict) Case {
		return from(id, level, source, says, response, want)
	}
	// behind is a response behind which more comes, at once or when the client has its answer.
	behind := func(id, source, method, response string) []Case {
		request := strings.Replace(get(""), "GET", method, 1)
		code := 200
		fmt.Sscanf(response, "HTTP/1.1 %d", &code)
		at := func(id string, level Level, client, origin []step) Case {
			return Case{ID: id, Section: responses, Level: level, Source: source, Says: "what follows a response never reaches anybody",
				Client: client, Methods: []string{method}, Origin: [][]step{origin, {readAll, answer}}, Want: anyOf(status(code), status(502))}
		}
		return []Case{
			at(id, Must, []step{send(request)}, []step{readAll, send(response + evil)}),
			at(id+"-late", Must, []step{send(request), await("that-was-all"), pause(20 * time.Millisecond), tell("the client got its answer"), hear("the origin went on"), pause(20 * time.Millisecond)},
				[]step{readAll, send(response), hear("the client got its answer"), perhaps(send(evil)), tell("the origin went on")}),
		}
	}
	const (
		last  = "X-Last: that-was-all\r\n"
		hello = "Content-Length: 5\r\n\r\nhello"
	)
	all := []Case{
		bad("status-garbage", "RFC 9112 4", "garbage\r\n\r\n"),
		bad("status-ssh", "RFC 9112 4", "SSH-2.0-OpenSSH_9.9\r\n"),
		mend("status-http2", "RFC 9112 2.3", "HTTP/2.0 200 OK\r\n"+hello),
		mend("status-http12", "RFC 9112 2.3", "HTTP/1.2 200 OK\r\n"+hello),
		mend("status-http09", "RFC 9112 2.3", "HTTP/0.9 200 OK\r\n"+hello),
		mend("status-version-case", "RFC 9112 2.3", "http/1.1 200 OK\r\n"+hello),
		bad("status-icy", "RFC 9112 4", "ICY 200 OK\r\n"+hello),
		bad("status-two-digits", "RFC 9112 4", "HTTP/1.1 20 OK\r\n"+hello),
		bad("status-four-digits", "RFC 9112 4", "HTTP/1.1 2000 OK\r\n"+hello),
		bad("status-099", "RFC 9110 15", "HTTP/1.1 099 OK\r\n"+hello),
		bad("status-600", "RFC 9110 15", "HTTP/1.1 600 OK\r\n"+hello).should(),
		bad("status-sign", "RFC 9112 4", "HTTP/1.1 +20 OK\r\n"+hello),
		bad("status-words", "RFC 9112 4", "HTTP/1.1 abc OK\r\n"+hello),
		mend("status-no-phrase", "RFC 9112 4", "HTTP/1.1 200\r\n"+hello),
		mend("status-control", "RFC 9112 4", "HTTP/1.1 200 O\x00K\r\n"+hello),
		mend("status-cr", "RFC 9112 2.2", "HTTP/1.1 200 O\rK\r\n"+hello),
		mend("response-lf", "RFC 9112 2.2", "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"),
		mend("response-lf-field", "RFC 9112 2.2", ok+"X-A: 1\nX-B: 2\r\n"+hello),
		mend("response-fold", "RFC 9112 5.2", ok+"X-A: 1\r\n 2\r\n"+hello),
		mend("response-space-colon", "RFC 9112 5.1", ok+"X-A : 1\r\n"+hello),
		mend("response-space-colon-length", "RFC 9112 5.1", ok+"Content-Length : 5\r\n\r\nhello"),
		mend("response-name-space", "RFC 9110 5.1", ok+"X A: 1\r\n"+hello, no("X A")),
		mend("response-no-colon", "RFC 9112 5", ok+"garbage\r\n"+hello),
		mend("response-nul", "RFC 9110 5.5", ok+"X-A: a\x00b\r\n"+hello),
		mend("response-cr", "RFC 9112 2.2", ok+"X-A: a\rSet-Cookie: b\r\n"+hello, no("Set-Cookie")),
		mend("response-cl-te", "RFC 9112 6.3", ok+"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
		mend("response-te-cl", "RFC 9112 6.3", ok+"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
		bad("response-cl-two", "RFC 9112 6.3", ok+"Content-Length: 5\r\nContent-Length: 3\r\n\r\nhello"),
		mend("response-cl-two-same", "RFC 9112 6.3", ok+"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
		bad("response-cl-list", "RFC 9112 6.3", ok+"Content-Length: 5, 3\r\n\r\nhello"),
		bad("response-cl-plus", "RFC 9112 6.3", ok+"Content-Length: +5\r\n\r\nhello"),
		bad("response-cl-minus", "RFC 9112 6.3", ok+"Content-Length: -5\r\n\r\nhello"),
		bad("response-cl-letters", "RFC 9112 6.3", ok+"Content-Length: 5a\r\n\r\nhello"),
		bad("response-cl-overflow", "RFC 9112 6.3", ok+"Content-Length: 18446744073709551621\r\n\r\nhello"),
		bad("response-te-unknown", "RFC 9112 6.1", ok+"Transfer-Encoding: foo\r\n\r\nhello").should(),
		bad("response-te-twice", "RFC 9112 6.1", ok+"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n").should(),
		mend("response-te-10", "RFC 9112 6.1", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
		bad("response-head-12m", "RFC 9110 5.4", ok+"X-A: "+strings.Repeat("a", 12<<20)+"\r\n"+hello).should(),
		from("response-head-15k", Should, "RFC 9110 5.4", "passed on", ok+strings.Repeat("X-A: "+strings.Repeat("a", 293)+"\r\n", 50)+hello, passed(200, "hello")),
		{ID: "response-nothing", Section: responses, Level: Must, Source: "RFC 9110 15.6.3", Says: "502", Client: []step{send(get(""))}, Origin: [][]step{{readAll, hangUp}}, Want: status(502)},
		bad("response-half-head", "RFC 9112 8", ok+"X-A: 1"),

		// the end of the body
		from("cut-length", Must, "RFC 9112 8", "502, or seen to break off", ok+"Content-Length: 100\r\n\r\nhello", truncated).ended(),
		from("cut-length-large", Must, "RFC 9112 8", "seen to break off", ok+"Content-Length: 2000000\r\n\r\n"+strings.Repeat("a", 1000000), truncated).ended(),
		from("cut-chunks", Must, "RFC 9112 8", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", truncated).ended(),
		from("cut-chunk", Must, "RFC 9112 8", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", truncated).ended(),
		from("cut-chunks-end", Must, "RFC 9112 8", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", truncated).ended(),
		{ID: "cut-reset", Section: responses, Level: Must, Source: "RFC 9112 8", Says: "502, or seen to break off", Client: []step{send(get(""))},
			Origin: [][]step{{readAll, send(ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"), pause(50 * time.Millisecond), reset}, {readAll, answer}}, Want: truncated},
		from("chunk-bad-size", Must, "RFC 9112 7.1", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n\r\n", truncated),
		from("chunk-bad-end", Must, "RFC 9112 7.1", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!!!\r\n0\r\n\r\n", truncated),
		from("chunk-bad-minus", Must, "RFC 9112 7.1", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", truncated),
		from("chunk-bad-overflow", Must, "RFC 9112 7.1", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", truncated),
		from("chunk-bad-lf", Should, "RFC 9112 7.1", "502, or seen to break off", ok+"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n", truncated),
		{ID: "chunk-bad-late", Section: responses, Level: Must, Source: "RFC 9112 7.1", Says: "seen to break off", Client: []step{send(get(""))},
			Origin: [][]step{{readAll, send(ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"), pause(100 * time.Millisecond), send("zz\r\nhello\r\n0\r\n\r\n")}, {readAll, answer}}, Want: truncated},
		pass("close-delimited", Must, "RFC 9112 6.3", "passed on", ok+"\r\nhello", passed(200, "hello")).ended(),
		pass("close-delimited-10", Must, "RFC 9112 6.3", "passed on", "HTTP/1.0 200 OK\r\n\r\nhello", passed(200, "hello")).ended(),
		pass("length-10", Must, "RFC 9112 9.3", "passed on; an HTTP/1.0 origin's connection is not used again", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", passed(200, "hello")).ended(),
		pass("keep-alive-10", Must, "RFC 9112 9.3", "passed on", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"+hello, passed(200, "hello")),
		pass("chunks-passed", Must, "RFC 9112 7.1", "passed on", ok+"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nhe\r\n003\r\nllo\r\n0\r\n\r\n", both(passed(200, "hello"), stays)),
		pass("chunks-none", Must, "RFC 9112 7.1", "passed on", ok+"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", both(passed(200, ""), stays)),
		pass("length-0", Must, "RFC 9110 8.6", "passed on", ok+"Content-Length: 0\r\n\r\n", both(passed(200, ""), stays)),
		pass("close-announced", Must, "RFC 9112 9.6", "passed on; the connection is not used again, whatever the client's is", ok+"Connection: close\r\n"+hello, both(passed(200, "hello"), stays)).ended().should(),

		// no body
		pass("head", Must, "RFC 9110 9.3.2", "no body", ok+"Content-Length: 5\r\n\r\n", both(passed(200, "", field("Content-Length", "5")), stays)).to("HEAD", strings.Replace(get(""), "GET", "HEAD", 1)),
		pass("head-chunked", Must, "RFC 9110 9.3.2", "no body", ok+"Transfer-Encoding: chunked\r\n\r\n", both(passed(200, ""), stays)).to("HEAD", strings.Replace(get(""), "GET", "HEAD", 1)),
		pass("head-no-length", Must, "RFC 9110 9.3.2", "no body", ok+"X-A: 1\r\n\r\n", passed(200, "", field("X-A", "1"))).to("HEAD", strings.Replace(get(""), "GET", "HEAD", 1)),
		pass("204", Must, "RFC 9110 15.3.5", "no body", "HTTP/1.1 204 No Content\r\n\r\n", both(passed(204, ""), stays)),
		pass("204-length", Must, "RFC 9110 8.6", "passed on without a length", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", passed(204, "")),
		pass("204-chunked", Must, "RFC 9112 6.1", "502, or passed on without the coding", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", anyOf(status(502), passed(204, ""))),
		pass("304", Must, "RFC 9110 15.4.5", "no body, whatever its length", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\n", both(passed(304, "", field("ETag", `"a"`)), stays)),
		pass("205", Must, "RFC 9110 15.3.6", "passed on", "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", both(passed(205, ""), stays)),

		// fields
		pass("response-nominated", Must, "RFC 9110 7.6.1", "what Connection names is not passed on", ok+"Connection: X-Hop\r\nX-Hop: 1\r\nX-End: 1\r\n"+hello, passed(200, "hello", no("X-Hop"), field("X-End", "1"))),
		pass("response-keep-alive", Must, "RFC 9110 7.6.1", "Keep-Alive and Proxy-Connection are not passed on", ok+"Keep-Alive: timeout=5\r\nProxy-Connection: x\r\n"+hello, passed(200, "hello", func(r *response) error {
			if r.value("Keep-Alive") == "timeout=5" || r.value("Proxy-Connection") != "" {
				return fmt.Errorf("passed on")
			}
			return nil
		})),
		pass("response-nominated-length", Must, "hop-by-hop abuse, N. Davison 2019", "Connection cannot take Content-Length away", ok+"Connection: Content-Length\r\n"+hello, anyOf(status(502), passed(200, "hello"))),
		pass("date-kept", Should, "RFC 9110 6.6.1", "passed on", ok+"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"+hello, passed(200, "hello", field("Date", "Mon, 01 Jan 2024 00:00:00 GMT"))),
		pass("date-added", Should, "RFC 9110 6.6.1", "a Date is added", ok+hello, passed(200, "hello", func(r *response) error {
			if n := len(r.values("Date")); n != 1 {
				return fmt.Errorf("200 with %d Date fields", n)
			}
			return nil
		})),
		pass("fields-order", Must, "RFC 9110 5.3", "passed on in order", ok+"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n"+hello, passed(200, "hello", func(r *response) error {
			if got := strings.Join(r.values("Set-Cookie"), " "); got != "a=1 b=2" {
				return fmt.Errorf("200 with Set-Cookie %q", got)
			}
			return nil
		})),
		pass("response-high", Should, "RFC 9110 5.5", "passed on byte for byte", ok+"X-A: \xe4\xff\r\n"+hello, passed(200, "hello", field("X-A", "\xe4\xff"))),
		pass("response-599", Should, "RFC 9110 15", "passed on", "HTTP/1.1 599 x\r\n"+hello, passed(599, "hello")),
		pass("response-502", Must, "RFC 9110 15", "the origin's own error is passed on", "HTTP/1.1 502 x\r\nX-A: 1\r\n"+hello, passed(502, "hello", field("X-A", "1"))),

		// what was not asked for
		bad("101-unasked", "RFC 9110 15.2.2", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n"),
		bad("101-unasked-bare", "RFC 9110 15.2.2", "HTTP/1.1 101 Switching Protocols\r\n\r\n"+evil),
		from("100-unasked", Must, "RFC 9110 15.2.1", "the final response arrives", "HTTP/1.1 100 Continue\r\n\r\n"+length("hello"), passed(200, "hello")),
		from("1xx-flood", Should, "RFC 9110 15.2", "502", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000)+length("hello"), status(502)),
		bad("1xx-alone", "RFC 9110 15.2", "HTTP/1.1 103 Early Hints\r\n\r\n"),
		bad("1xx-malformed", "RFC 9110 15.2", "HTTP/1.1 103 Early Hints\r\ngarbage\r\n\r\n"+length("hello")).should(),
		{ID: "1xx-length", Section: responses, Level: Must, Source: "RFC 9112 6.3", Says: "an interim response has no body",
			Client: []step{send(get(""))}, Origin: [][]step{{readAll, send("HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n" + length("hello"))}, {readAll, answer}}, Want: anyOf(status(502), passed(200, "hello"))},
		{ID: "unasked", Section: responses, Level: Must, Source: "RFC 9112 9.2", Says: "a response before its request is nobody's",
			Client: []step{send(get("")), await("that-was-all"), pause(20 * time.Millisecond), tell("the client got its answer"), hear("the origin went on"), pause(50 * time.Millisecond)},
			Origin: [][]step{{readAll, send(ok + last + hello), hear("the client got its answer"), perhaps(send(evil + evil)), tell("the origin went on")}, {readAll, answer}}, Want: passed(200, "hello")},
	}
	for _, c := range [][]Case{
		behind("behind-length", "RFC 9112 6.3", "GET", ok+last+hello),
		behind("behind-chunks", "RFC 9112 6.3", "GET", ok+last+"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
		behind("behind-head", "RFC 9110 9.3.2", "HEAD", ok+last+"Content-Length: 5\r\n\r\n"),
		behind("behind-204", "RFC 9110 15.3.5", "GET", "HTTP/1.1 204 No Content\r\n"+last+"\r\n"),
		behind("behind-205", "RFC 9110 15.3.6", "GET", "HTTP/1.1 205 Reset Content\r\n"+last+"Content-Length: 0\r\n\r\n"),
		behind("behind-304", "RFC 9110 15.4.5", "GET", "HTTP/1.1 304 Not Modified\r\n"+last+"Content-Length: 5\r\n\r\n"),
	} {
		all = append(all, c...)
	}
	return all
}

func streamCases() []Case {
	row := func(id string, level Level, source, says string, client, origin []step, want verdict) Case {
		return Case{ID: id, Section: streams, Level: level, Source: source, Says: says, Client: client, Origin: [][]step{origin, {readAll, answer}}, Want: want}
	}
	const (
		inChunks  = "Transfer-Encoding: chunked\r\n\r\n"
		hello     = "5\r\nhello\r\n0\r\n\r\n"
		toHTTP10  = "GET {p}/a HTTP/1.0\r\n" + host + "\r\n"
		keep10    = "GET {p}/a HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n\r\n"
		hints     = "HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
		proceed   = "HTTP/1.1 100 Continue\r\n\r\n"
		expecting = "Expect: 100-continue\r\nContent-Length: 5\r\n"
		tooLarge  = "HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno!"
		soon      = time.Second
	)
	big := strings.Repeat("a", 4<<20)
	final := []string{proceed, " 200 ", " 413 ", " 417 ", " 400 ", " 502 "}
	return []Case{
		row("http10-chunks", Must, "RFC 9112 6.1", "no chunks for HTTP/1.0", []step{send(toHTTP10)}, []step{readAll, send(ok + inChunks + hello)}, both(passed(200, "hello", unchunked), closes)),
		row("http10-chunks-keep", Must, "RFC 9112 6.1", "no chunks for HTTP/1.0, whatever it says of the connection", []step{send(keep10)}, []step{readAll, send(ok + inChunks + hello)}, passed(200, "hello", unchunked)),
		row("http10-until-close", Must, "RFC 9112 6.3", "passed on and closed", []step{send(toHTTP10)}, []step{readAll, send(ok + "\r\nhello"), hangUp}, both(passed(200, "hello", unchunked), closes)),
		row("http10-length", Must, "RFC 9112 9.3", "kept open only if it asks for that", []step{send(toHTTP10)}, []step{readAll, send(length("hello"))}, both(passed(200, "hello"), closes)),
		row("http10-103", Must, "RFC 9110 15.2", "no interim responses for HTTP/1.0", []step{send(toHTTP10)}, []step{readAll, send(hints + length("hello"))}, passed(200, "hello", interim())),
		row("http10-trailers", Must, "RFC 9112 7.1.2", "no trailers for HTTP/1.0", []step{send(toHTTP10)}, []step{readAll, send(ok + inChunks + "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")}, passed(200, "hello", unchunked)),
		row("http10-cut", Should, "RFC 9112 8", "502, or a reset: the end of the connection is the end of the body", []step{send(toHTTP10)}, []step{readAll, send(ok + "Content-Length: 100\r\n\r\nhello"), hangUp}, truncated),

		row("103", Should, "RFC 9110 15.2; RFC 8297", "passed on", []step{send(get(""))}, []step{readAll, send(hints + length("hello"))}, passed(200, "hello", interim(103))),
		row("103-early", Should, "RFC 8297", "passed on at once", []step{send(get("")), within(soon, await("103 Early Hints")), tell("the hints came")}, []step{readAll, send(hints), perhaps(hear("the hints came")), send(length("hello"))}, passed(200, "hello", interim(103))),
		row("103-two", Should, "RFC 8297 2", "both passed on", []step{send(get(""))}, []step{readAll, send(hints + hints + length("hello"))}, passed(200, "hello", interim(103, 103))),
		row("102", Should, "RFC 9110 15.2", "passed on", []step{send(get(""))}, []step{readAll, send("HTTP/1.1 102 Processing\r\n\r\n" + length("hello"))}, passed(200, "hello", interim(102))),
		row("1xx-unknown", Should, "RFC 9110 15.2", "passed on", []step{send(get(""))}, []step{readAll, send("HTTP/1.1 150 Something\r\n\r\n" + length("hello"))}, passed(200, "hello", interim(150))),
		row("103-then-cut", Must, "RFC 9112 8", "502, or seen to break off", []step{send(get(""))}, []step{readAll, send(hints + ok + "Content-Length: 100\r\n\r\nhello"), hangUp}, truncated),

		row("expect", Must, "RFC 9110 10.1.1", "100 arrives, then the body", []step{send(post(expecting, "")), await(proceed), send("hello")}, []step{proceeds, readAll, answer}, forwarded(body("hello"))),
		row("expect-at-once", Must, "RFC 9110 10.1.1", "a body that does not wait arrives", []step{send(post(expecting, "hello"))}, []step{proceeds, readAll, answer}, forwarded(body("hello"))),
		row("expect-no-100", Must, "RFC 9110 10.1.1", "no deadlock with an origin that never says 100", []step{send(post(expecting, "")), perhaps(within(soon, await(proceed))), send("hello")}, []step{readAll, answer}, forwarded(body("hello"))),
		row("expect-refused", Must, "RFC 9110 10.1.1", "the origin's refusal arrives", []step{send(post("Expect: 100-continue\r\nContent-Length: 1000\r\n", "")), await(final...), perhaps(send(strings.Repeat("a", 1000)))}, []step{send(tooLarge), hangUp}, status(413)),
		row("expect-doomed", Should, "RFC 9110 10.1.1", "no 100 before the origin's refusal", []step{send(post("Expect: 100-continue\r\nContent-Length: 1000000\r\n", "")), await(final...), perhaps(send(big[:1000000]))}, []step{send(tooLarge), hangUp},
			passed(413, "no!", interim())),
		row("expect-final", Must, "RFC 9110 10.1.1", "an answer without 100 arrives, and what follows is read as what it is", []step{send(post(expecting, "")), await(final...), perhaps(send("hello"))}, []step{send(length("early")), readAll}, anyOf(passed(200, "early"), status(502))),
		row("expect-10", Must, "RFC 9110 10.1.1", "no 100 for HTTP/1.0", []step{send("POST {p}/a HTTP/1.0\r\n" + host + expecting + "\r\nhello")}, []step{readAll, answer}, both(forwarded(body("hello")), passed(200, "a", interim()))),
		row("expect-get", Must, "RFC 9110 10.1.1", "means nothing without a body", []step{send(get("Expect: 100-continue\r\n"))}, []step{readAll, answer}, either(denied(400, 417), forwarded())),
		row("expect-unknown", Must, "RFC 9110 10.1.1", "417, or forwarded", []step{send(get("Expect: foo\r\n"))}, []step{readAll, answer}, either(denied(400, 417), forwarded())),
		row("expect-chunked", Must, "RFC 9110 10.1.1", "100 arrives, then the body", []step{send(post("Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n", "")), await(proceed), send(hello)}, []step{proceeds, readAll, answer}, forwarded(body("hello"))),

		row("early-413", Should, "RFC 9112 9.3", "an early answer arrives while the upload runs", []step{send(post("Content-Length: 10000000\r\n", big[:64<<10])), within(soon, await(" 413 "))}, []step{send(tooLarge), hangUp}, status(413)).open(),
		row("early-413-all", Should, "RFC 9112 9.5", "an early answer arrives although all is sent", []step{send(post(fmt.Sprintf("Content-Length: %d\r\n", len(big)), big))}, []step{send(tooLarge), hangUp}, status(413)),
		row("early-200", Should, "RFC 9112 9.3", "an early answer arrives while the upload runs", []step{send(post("Content-Length: 10000000\r\n", big[:64<<10])), within(soon, await("early"))}, []step{send(length("early"))}, passed(200, "early")).open(),
		row("both-ways", Should, "RFC 9112 9.3", "request and response stream at once", []step{send(chunked("5\r\nping1\r\n")), within(soon, await("ping1")), send("5\r\nping2\r\n"), within(soon, await("ping2")), send("0\r\n\r\n")},
			[]step{perhaps(within(soon+200*time.Millisecond, await("ping1"))), send(ok + inChunks + "5\r\nping1\r\n"), perhaps(within(soon+200*time.Millisecond, await("ping2"))), send("5\r\nping2\r\n"), readAll, send("0\r\n\r\n")}, both(reached(body("ping1ping2")), passed(200, "ping1ping2"))),
		row("upload-streams", Should, "RFC 9112 6", "the origin gets what the client has sent so far", []step{send(post("Content-Length: 100010\r\n", "hello"+strings.Repeat("a", 100000))), hear("the origin got nothing of the body within 1 s"), send("world")}, []step{await("hello"), tell("the origin got nothing of the body within 1 s"), readAll, answer}, forwarded(body("hello"+strings.Repeat("a", 100000)+"world"))),

		row("sse-chunks", Should, "HTML 9.2", "each event arrives within a second", []step{send(get("Accept: text/event-stream\r\n")), within(soon, await("data: 1")), tell("the event came"), within(soon, await("data: 2"))},
			[]step{readAll, send(ok + "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n" + inChunks + "9\r\ndata: 1\n\n\r\n"), perhaps(hear("the event came")), send("9\r\ndata: 2\n\n\r\n0\r\n\r\n")}, passed(200, "data: 1\n\ndata: 2\n\n")),
		row("sse-until-close", Should, "HTML 9.2", "each event arrives within a second", []step{send(get("Accept: text/event-stream\r\n")), within(soon, await("data: 1")), tell("the event came")},
			[]step{readAll, send(ok + "Content-Type: text/event-stream\r\n\r\ndata: 1\n\n"), perhaps(hear("the event came")), send("data: 2\n\n"), hangUp}, passed(200, "data: 1\n\ndata: 2\n\n")),
		row("flush-length", Should, "RFC 9112 6", "a body with a length arrives as it comes", []step{send(get("")), within(soon, await("hello")), tell("the first half came")}, []step{readAll, send(ok + "Content-Length: 10\r\n\r\nhello"), perhaps(hear("the first half came")), send("world")}, passed(200, "helloworld")),
		row("flush-head", Should, "RFC 9112 6", "the head arrives when it was sent", []step{send(get("")), within(soon, await("early-field")), tell("the head came")}, []step{readAll, send(ok + "X-A: early-field\r\nContent-Length: 5\r\n\r\n"), perhaps(hear("the head came")), send("hello")}, passed(200, "hello")),
		row("response-drip", Must, "RFC 9112 2.2", "read however it arrives", []step{send(get(""))}, []step{readAll, drip(ok + inChunks + "2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")}, passed(200, "hello")),
		row("response-4m", Must, "RFC 9112 6", "passed on", []step{send(get(""))}, []step{readAll, send(length(big))}, passed(200, big)),
		row("upload-4m-chunked", Must, "RFC 9112 7.1", "forwarded", []step{send(chunked("400000\r\n" + big + "\r\n0\r\n\r\n"))}, []step{readAll, answer}, forwarded(body(big))),

		row("response-trailer", Must, "RFC 9110 6.5", "the body arrives, the trailer or not", []step{send(get("TE: trailers\r\nConnection: TE\r\n"))}, []step{readAll, send(ok + inChunks + "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")}, both(passed(200, "hello"), stays)),
		row("response-trailer-passed", Should, "RFC 9110 6.5", "the trailer arrives", []step{send(get("TE: trailers\r\nConnection: TE\r\n"))}, []step{readAll, send(ok + "Trailer: X-Sum\r\n" + inChunks + "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")}, passed(200, "hello", withTrailer("X-Sum", "1"))),
		row("response-trailer-unannounced", Should, "RFC 9110 6.5", "the trailer arrives", []step{send(get("TE: trailers\r\nConnection: TE\r\n"))}, []step{readAll, send(ok + inChunks + "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")}, passed(200, "hello", withTrailer("X-Sum", "1"))),
		row("response-trailer-framing", Must, "RFC 9110 6.5.1", "what frames is no trailer", []step{send(get("TE: trailers\r\nConnection: TE\r\n"))}, []step{readAll, send(ok + inChunks + "5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n")}, anyOf(passed(200, "hello", no("Content-Length")), truncated)),
	}
}

func upgradeCases() []Case {
	const (
		asked    = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
		switches = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
		ping     = "\x89\x84\x00\x00\x00\x00ping"
		pong     = "\x8a\x04pong"
		closing  = "\x88\x00"
	)
	row := func(id string, level Level, source, says string, client, origin []step, want verdict) Case {
		return Case{ID: id, Section: upgrades, Level: level, Source: source, Says: says, Client: client, Origin: [][]step{origin, {readAll, answer}}, Want: want, Open: true}
	}
	// http is a row in which no tunnel is made.
	http := func(c Case) Case {
		c.Open = false
		return c
	}
	handshake := passed(101, "", field("Upgrade", "websocket"), field("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), func(r *response) error {
		if !strings.EqualFold(r.value("Connection"), "upgrade") {
			return fmt.Errorf("101 with Connection %q", r.value("Connection"))
		}
		return nil
	})
	asks := func(_ *Case, r *request) error {
		if !strings.EqualFold(r.value("Upgrade"), "websocket") || !strings.Contains(strings.ToLower(r.value("Connection")), "upgrade") {
			return fmt.Errorf("forwarded with Connection %q, Upgrade %q", r.value("Connection"), r.value("Upgrade"))
		}
		return nil
	}
	tunnel := both(reached(asks, has("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")), handshake)
	return []Case{
		row("websocket", Must, "RFC 6455 4", "a tunnel, to the byte", []step{send(get(asked)), await("\r\n\r\n"), send(ping), await(pong)}, []step{send(switches), await(ping), send(pong), pause(20 * time.Millisecond), hangUp}, tunnel),
		row("websocket-case", Must, "RFC 6455 4.2.1", "names have no case, and stand in lists", []step{send(get(strings.Replace(asked, "Connection: Upgrade\r\nUpgrade: websocket", "Connection: keep-alive, upgrade\r\nUpgrade: WebSocket", 1))), await("\r\n\r\n"), send(ping), await(pong)},
			[]step{send(switches), await(ping), send(pong), pause(20 * time.Millisecond), hangUp}, tunnel),
		row("websocket-origin-first", Must, "RFC 6455 4", "what comes with the 101 arrives", []step{send(get(asked)), await(pong), send(ping), hear("the client's frame never came")}, []step{send(switches + pong), await(ping), tell("the client's frame never came"), hangUp}, tunnel),
		row("websocket-early", Must, "RFC 9110 7.8", "what comes before the 101 arrives", []step{send(get(asked) + ping), await(pong)}, []step{pause(50 * time.Millisecond), send(switches), await(ping), send(pong), pause(20 * time.Millisecond), hangUp}, tunnel),
		row("websocket-origin-ends", Must, "RFC 6455 7.1.1", "the origin's end is the client's", []step{send(get(asked)), await(closing), within(time.Second, waitEnd)}, []step{send(switches + closing), hangUp}, tunnel),
		row("websocket-client-ends", Must, "RFC 6455 7.1.1", "the client's end is the origin's", []step{send(get(asked)), await("\r\n\r\n"), send(ping), halfClose, hear("the origin's connection never ended")}, []step{send(switches), await(ping), waitEnd, tell("the origin's connection never ended"), hangUp}, tunnel),
		row("websocket-half-close", Should, "RFC 9293 3.6", "one direction may end before the other", []step{send(get(asked)), await("\r\n\r\n"), send(ping), halfClose, await(pong)}, []step{send(switches), await(ping), pause(100 * time.Millisecond), send(pong), hangUp}, tunnel),
		row("websocket-103", Should, "RFC 8297", "a tunnel behind an interim response", []step{send(get(asked)), await("101 "), await("\r\n\r\n"), send(ping), await(pong)}, []step{send("HTTP/1.1 103 Early Hints\r\n\r\n" + switches), await(ping), send(pong), pause(20 * time.Millisecond), hangUp}, tunnel),
		http(row("websocket-refused", Must, "RFC 6455 4.2.2", "a refusal is passed on, and the connection goes on", []step{send(get(asked))}, []step{readAll, send("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")}, passed(403, "no"))),
		http(row("websocket-ignored", Must, "RFC 9110 7.8", "an ordinary answer is passed on", []step{send(get(asked))}, []step{readAll, answer}, forwarded())),
		http(row("websocket-426", Must, "websocket smuggling, M. Egorov 2019", "no tunnel without a 101: what follows is read as a request",
			[]step{send(get(strings.Replace(asked, "Version: 13", "Version: 1337", 1))), await(" 426 ", " 400 ", " 501 "), pause(50 * time.Millisecond), send("GET {p}/smuggled HTTP/1.1\r\n" + host + "X-A : 1\r\n\r\n")},
			[]step{readAll, send("HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n")}, func(_ *Case, o *outcome) error {
				if len(o.requests) > 1 {
					return fmt.Errorf("forwarded %s", o.forms())
				}
				return o.answered([]int{426, 400, 501})
			})).withMethods("GET", "GET"),
		http(row("websocket-10", Must, "RFC 9110 7.8", "no upgrade in HTTP/1.0", []step{send(strings.Replace(get(asked), "HTTP/1.1", "HTTP/1.0", 1))}, []step{readAll, answer}, either(denied(400, 426), forwarded(lacks("Upgrade"))))),
		http(row("upgrade-unnamed", Must, "RFC 9110 7.8", "an Upgrade that Connection does not name is none", []step{send(get(strings.Replace(asked, "Connection: Upgrade\r\n", "", 1)))}, []step{readAll, answer}, either(denied(400, 426), forwarded(func(_ *Case, r *request) error {
			if strings.Contains(strings.ToLower(r.value("Connection")), "upgrade") {
				return fmt.Errorf("forwarded with Connection %q", r.value("Connection"))
			}
			return nil
		})))),
		http(row("upgrade-h2c", Should, "h2c smuggling, J. Miller 2020; RFC 9113 3.1", "not forwarded", []step{send(get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"))}, []step{readAll, answer}, either(denied(400, 501), forwarded(lacks("Upgrade", "HTTP2-Settings"))))),
		http(row("upgrade-unknown", Should, "RFC 9110 7.8", "not forwarded unless it is allowed", []step{send(get("Connection: Upgrade\r\nUpgrade: foo\r\n"))}, []step{readAll, answer}, either(denied(400, 501), forwarded(lacks("Upgrade"))))),
		http(row("101-another", Should, "RFC 9110 7.8", "502 for a protocol that nobody asked for", []step{send(get(asked))}, []step{send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n"), pause(50 * time.Millisecond), hangUp}, status(502))),
		http(row("101-to-post", Must, "RFC 9110 7.8", "no tunnel before the request has ended", []step{send(post("Content-Length: 5\r\n", "he")), pause(50 * time.Millisecond), send("llo")}, []step{send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"), hangUp}, status(502))),
	}
}

// open returns the case with a connection that is no place for another request.
func (c Case) open() Case {
	c.Open = true
	return c
}

// slow returns the case with a time of its own.
func (c Case) slow(d time.Duration) Case {
	c.Time = d
	return c
}

// withMethods returns the case with more than one answer.
func (c Case) withMethods(methods ...string) Case {
	c.Methods = methods
	return c
}

func connectionCases() []Case {
	row := func(id string, level Level, source, says string, answers int, client []step, want verdict, origin ...[]step) Case {
		c := Case{ID: id, Section: connections, Level: level, Source: source, Says: says, Client: client, Origin: origin, Want: want}
		for range answers {
			c.Methods = append(c.Methods, "GET")
		}
		return c
	}
	req := func(path string) string { return "GET {p}/" + path + " HTTP/1.1\r\n" + host + "\r\n" }
	upload := func(path string) string {
		return "POST {p}/" + path + " HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhello"
	}
	ordinary := []step{readAll, answer}
	// closing is an origin that closes the connection when the client has its answer.
	closing := []step{readAll, answer, hear("the client got its answer"), perhaps(halfClose), tell("the origin closed"), hangUp}
	// The end of a connection is now and then sent again after 200 ms: only then is it seen.
	waits := func(second string) []step {
		return []step{send(req("first")), await("first"), tell("the client got its answer"), hear("the origin closed"), pause(400 * time.Millisecond), send(second)}
	}
	silent := []step{readAll, hangUp}
	leaves := hearFor(5*time.Second, "the origin's connection stayed open")
	var twenty strings.Builder
	var numbers []string
	for n := range 20 {
		twenty.WriteString(req(fmt.Sprint("n", n)))
		numbers = append(numbers, fmt.Sprint("n", n))
	}
	return []Case{
		row("pipeline", Must, "RFC 9112 9.3.2", "answered in order", 2, []step{send(req("slow") + req("fast"))}, both(bodies("slow", "fast"), deliveries(2, 2)), []step{readAll, pause(100 * time.Millisecond), answer}, ordinary),
		row("pipeline-20", Must, "RFC 9112 9.3.2", "answered in order", 20, []step{send(twenty.String())}, both(bodies(numbers...), deliveries(20, 20))),
		row("pipeline-post", Must, "RFC 9112 9.3.2", "each body is its own request's", 3, []step{send(upload("first") + req("second") + "POST {p}/third HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")}, both(bodies("first", "second", "third"), deliveries(3, 3))),
		row("pipeline-pieces", Must, "RFC 9112 9.3.2", "requests that arrive in pieces", 2, []step{send(req("first") + req("second")[:20]), pause(50 * time.Millisecond), send(req("second")[20:])}, both(bodies("first", "second"), deliveries(2, 2))),
		row("pipeline-bad", Must, "RFC 9112 9.3.2", "the first is answered before the second is refused", 2, []step{send(req("first") + post("Content-Length: x\r\n", "") + extra)}, func(_ *Case, o *outcome) error {
			if len(o.responses) != 2 || o.responses[0].status != 200 || o.responses[1].status != 400 || !o.closed {
				return fmt.Errorf("%d answers, the first %d", len(o.responses), o.first().status)
			}
			return nil
		}),
		row("keep-alive", Must, "RFC 9112 9.3", "the connection goes on", 1, []step{send(req("a"))}, both(forwarded(), stays)),
		row("keep-alive-asked", Should, "RFC 9112 9.3", "the connection goes on if it asks for that", 1, []step{send("GET {p}/a HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n\r\n")}, both(forwarded(), stays)),
		row("half-close", Should, "RFC 9112 9.6", "a client that ends its half is answered", 1, []step{send(req("a")), halfClose}, forwarded(), []step{readAll, pause(50 * time.Millisecond), answer}),
		row("client-leaves", Should, "RFC 9110 7.6", "the origin's work ends with it", 1, []step{send(req("a")), hear("never forwarded"), reset, leaves}, func(_ *Case, o *outcome) error {
			if len(o.requests) != 1 {
				return fmt.Errorf("%d requests reached the origin", len(o.requests))
			}
			return nil
		}, []step{readAll, tell("never forwarded"), waitEnd, tell("the origin's connection stayed open")}).slow(6 * time.Second),
		row("client-leaves-stream", Should, "RFC 9110 7.6", "the origin's work ends with it", 1, []step{send(req("a")), await("hello"), reset, leaves}, func(_ *Case, o *outcome) error {
			if len(o.requests) != 1 {
				return fmt.Errorf("%d requests reached the origin", len(o.requests))
			}
			return nil
		}, []step{readAll, send(ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"), waitEnd, tell("the origin's connection stayed open")}).slow(6 * time.Second),

		row("stale-get", Must, "RFC 9112 9.3.1", "answered over another connection", 2, waits(req("second")), both(bodies("first", "second"), deliveries(2, 2)), closing, ordinary),
		row("stale-post", Should, "RFC 9112 9.3.1", "nothing was written: answered over another connection", 2, waits(upload("second")), both(bodies("first", "second"), deliveries(2, 2)), closing, ordinary),
		row("stale-race-get", Should, "RFC 9110 9.2.2", "closed when the request came: sent again", 2, []step{send(req("first")), await("first"), send(req("second"))}, both(bodies("first", "second"), deliveries(2, 4)), ordinary, silent, ordinary),
		row("stale-race-post", Must, "RFC 9110 9.2.2", "closed when the request came: never sent again", 2, []step{send(req("first")), await("first"), send(upload("second"))}, func(_ *Case, o *outcome) error {
			if err := deliveries(2, 2)(nil, o); err != nil {
				return err
			}
			if n := len(o.responses); n > 1 && o.responses[1].status < 500 {
				return fmt.Errorf("answered %d", o.responses[1].status)
			}
			return nil // closed without an answer says the same as 502
		}, ordinary, silent, ordinary),
		row("cut-post", Must, "RFC 9110 9.2.2", "a POST that may have been seen is never sent again", 1, []step{send(upload("a"))}, both(deliveries(1, 1), status(502, 504)), silent, ordinary),
		row("reset-post", Must, "RFC 9110 9.2.2", "a POST that may have been seen is never sent again", 1, []step{send(upload("a"))}, both(deliveries(1, 1), status(502, 504)), []step{readAll, reset}, ordinary),
	}
}
