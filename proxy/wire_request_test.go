package proxy

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kerberos/registry"
)

// untouched starts an origin that must not be asked; the count is of the connections that came all the same.
func untouched(t testing.TB) (*origin, *atomic.Int32) {
	var came atomic.Int32
	return startOrigin(t, func(*origin, net.Conn, *bufio.Reader) { came.Add(1) }), &came
}

// smuggled is what stands behind a request that is refused: it must not be served.
const smuggled = "GET /echo/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

// What a client may not send: a status, the connection closed in order, and nothing of it for a backend.
func TestRefusedRequests(t *testing.T) {
	const get = "GET /echo HTTP/1.1\r\n"
	const post = "POST /echo HTTP/1.1\r\nHost: a\r\n"
	const chunked = post + "Transfer-Encoding: chunked\r\n\r\n"
	rows := []struct {
		name    string
		source  string
		request string
		status  int
	}{
		// lines and field names
		{"folded line", "RFC 9112 5.2", get + "Host: a\r\nX-A: 1\r\n 2\r\n\r\n", 400},
		{"folded with a tab", "RFC 9112 5.2", get + "Host: a\r\nX-A: 1\r\n\t2\r\n\r\n", 400},
		{"folded first line", "RFC 9112 2.2", get + " Host: a\r\n\r\n", 400},
		{"folded Transfer-Encoding", "RFC 9112 5.2", post + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 501},
		{"bare LF behind the request line", "RFC 9112 2.2", "GET /echo HTTP/1.1\nHost: a\r\n\r\n", 400},
		{"bare LF behind a field", "RFC 9112 2.2", get + "Host: a\nX-A: 1\r\n\r\n", 400},
		{"bare LF as empty line", "RFC 9112 2.2", get + "Host: a\r\n\n", 400},
		{"bare LFs only", "RFC 9112 2.2", "GET /echo HTTP/1.1\nHost: a\n\n", 400},
		{"bare LF before the request", "RFC 9112 2.2", "\n" + get + "Host: a\r\n\r\n", 400},
		{"bare CR in the request line", "RFC 9112 2.2", "GET /echo\r HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"bare CR in a value", "RFC 9112 2.2", get + "Host: a\r\nX-A: 1\rX-B: 2\r\n\r\n", 400},
		{"bare CR before the request", "RFC 9112 2.2", "\r" + get + "Host: a\r\n\r\n", 400},
		{"two CR before LF", "RFC 9112 2.2", get + "Host: a\r\r\nX-A: 1\r\n\r\n", 400},
		{"NUL in a value", "RFC 9110 5.5", get + "Host: a\r\nX-A: 1\x002\r\n\r\n", 400},
		{"vertical tab in a value", "RFC 9110 5.5", get + "Host: a\r\nX-A: long enough for a word\v\r\n\r\n", 400},
		{"DEL in a value", "RFC 9110 5.5", get + "Host: a\r\nX-A: \x7f\r\n\r\n", 400},
		{"NUL in a name", "RFC 9110 5.1", get + "Host: a\r\nX\x00A: 1\r\n\r\n", 400},
		{"space in a name", "RFC 9112 5.1", post + "Transfer Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"space before the colon", "RFC 9112 5.1", post + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400},
		{"tab before the colon", "RFC 9112 5.1", post + "Content-Length\t: 3\r\n\r\nabc", 400},
		{"bracket in a name", "RFC 9110 5.6.2", get + "Host: a\r\nX(A): 1\r\n\r\n", 400},
		{"bytes above ASCII in a name", "RFC 9110 5.6.2", get + "Host: a\r\nX-\xc3\xa4: 1\r\n\r\n", 400},
		{"no colon", "RFC 9112 5", get + "Host: a\r\nX-A\r\n\r\n", 400},
		{"no name", "RFC 9112 5", get + "Host: a\r\n: 1\r\n\r\n", 400},

		// request line
		{"HTTP/2.0", "RFC 9112 2.3", "GET /echo HTTP/2.0\r\nHost: a\r\n\r\n", 505},
		{"HTTP/2 preface", "RFC 9113 3.4", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
		{"HTTP/1.2", "RFC 9112 2.3", "GET /echo HTTP/1.2\r\nHost: a\r\n\r\n", 505},
		{"HTTP/0.9 by name", "RFC 9112 2.3", "GET /echo HTTP/0.9\r\nHost: a\r\n\r\n", 505},
		{"HTTP/0.9 by form", "RFC 9112 3", "GET /echo\r\n\r\n", 400},
		{"lower-case version", "RFC 9112 2.3", "GET /echo http/1.1\r\nHost: a\r\n\r\n", 400},
		{"two-digit version", "RFC 9112 2.3", "GET /echo HTTP/1.10\r\nHost: a\r\n\r\n", 400},
		{"version with a comma", "RFC 9112 2.3", "GET /echo HTTP/1,1\r\nHost: a\r\n\r\n", 400},
		{"space behind the version", "RFC 9112 3", "GET /echo HTTP/1.1 \r\nHost: a\r\n\r\n", 400},
		{"two spaces before the target", "RFC 9112 3", "GET  /echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"two spaces behind the target", "RFC 9112 3", "GET /echo  HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"tabs between the words", "RFC 9112 3", "GET\t/echo\tHTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"space before the method", "RFC 9112 3", " GET /echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"separator in the method", "RFC 9110 9.1", "G=T /echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"no method", "RFC 9112 3", "/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},

		// target
		{"space in the target", "RFC 9112 3.2", "GET /echo/a b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"NUL in the target", "RFC 9112 3.2", "GET /echo/\x00 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"DEL in the target", "RFC 9112 3.2", "GET /echo/\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"control byte in the query", "RFC 9112 3.2", "GET /echo?\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"fragment", "RFC 9112 3.2", "GET /echo#f HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"no slash", "RFC 9112 3.2.1", "GET echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"query alone", "RFC 9112 3.2.1", "GET ?x HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"asterisk without OPTIONS", "RFC 9112 3.2.4", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"asterisk with more", "RFC 9112 3.2.4", "OPTIONS *x HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"CONNECT", "RFC 9112 3.2.3", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405},
		{"connect", "RFC 9112 3.2.3", "connect a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405},
		{"CONNECT with a path", "RFC 9110 9.3.6", "CONNECT /echo HTTP/1.1\r\nHost: a\r\n\r\n", 405},
		{"CONNECT without a port", "RFC 9112 3.2.3", "CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"CONNECT with an empty port", "RFC 9112 3.2.3", "CONNECT a: HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"CONNECT without a host", "RFC 9112 3.2.3", "CONNECT :443 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"CONNECT with userinfo", "RFC 9110 9.3.6", "CONNECT u@a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"CONNECT *", "RFC 9112 3.2.4", "CONNECT * HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"ftp", "RFC 9112 3.2.2", "GET ftp://a/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute without authority", "RFC 9112 3.2.2", "GET http:///echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with nothing", "RFC 9112 3.2.2", "GET http:// HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with a port alone", "RFC 9112 3.2.2", "GET http://:80/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with userinfo", "RFC 9110 4.2.4", "GET http://u:p@a/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with a fragment", "RFC 9112 3.2.2", "GET http://a#/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with a backslash", "RFC 9112 3.2.2", "GET http://a\\b/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with a bad port", "RFC 9112 3.2.2", "GET http://a:b/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with an empty userinfo", "RFC 9110 4.2.4", "GET http://@a/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with userinfo alone", "RFC 9110 4.2.4", "GET http://u@/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with an escape in its host", "RFC 9110 4.2.3", "GET http://%61/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with a query for a host", "RFC 9112 3.2.2", "GET http://?/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with two authorities", "RFC 9112 3.2.2", "GET http://a,b/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute https without authority", "RFC 9112 3.2.2", "GET https:///echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with one slash", "RFC 9112 3.2.2", "GET http:/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute without slashes", "RFC 9112 3.2.2", "GET http:echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute with backslashes", "RFC 9112 3.2.2", "GET http:\\\\a\\echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"ws", "RFC 6455 3", "GET ws://a/echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"OPTIONS of a bad host", "RFC 9112 3.2.4", "OPTIONS http://u@a HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"fragment behind the query", "RFC 9112 3.2", "GET /echo?x#f HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"fragment alone", "RFC 9112 3.2", "GET # HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"tab in the target", "RFC 9112 3.2", "GET /echo\tx HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"empty target", "RFC 9112 3.2", "GET  HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"backslash for a slash", "RFC 9112 3.2.1", "GET \\echo HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"absolute without Host", "RFC 9112 3.2", "GET http://a/echo HTTP/1.1\r\n\r\n", 400},
		{"absolute with two Hosts", "RFC 9112 3.2", "GET http://a/echo HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400},

		// Host
		{"no Host", "RFC 9112 3.2", get + "X-A: 1\r\n\r\n", 400},
		{"empty Host", "RFC 9112 3.2", get + "Host:\r\n\r\n", 400},
		{"empty Host in HTTP/1.0", "RFC 9112 3.2", "GET /echo HTTP/1.0\r\nHost:\r\n\r\n", 400},
		{"two Hosts", "RFC 9112 3.2", get + "Host: a\r\nHost: b\r\n\r\n", 400},
		{"the same Host twice", "RFC 9112 3.2", get + "Host: a\r\nhost: a\r\n\r\n", 400},
		{"two Hosts in HTTP/1.0", "RFC 9112 3.2", "GET /echo HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400},
		{"list of Hosts", "RFC 9112 3.2", get + "Host: a, b\r\n\r\n", 400},
		{"userinfo in Host", "RFC 9110 7.2", get + "Host: u:p@a\r\n\r\n", 400},
		{"space in Host", "RFC 9110 7.2", get + "Host: a b\r\n\r\n", 400},
		{"path in Host", "RFC 9110 7.2", get + "Host: a/b\r\n\r\n", 400},
		{"query in Host", "RFC 9110 7.2", get + "Host: a?b\r\n\r\n", 400},
		{"bytes above ASCII in Host", "RFC 9110 7.2", get + "Host: \xc3\xa4\r\n\r\n", 400},
		{"port that is none", "RFC 9110 7.2", get + "Host: a:b\r\n\r\n", 400},
		{"two ports", "RFC 9110 7.2", get + "Host: a:80:80\r\n\r\n", 400},
		{"port without host", "RFC 9110 7.2", get + "Host: :80\r\n\r\n", 400},
		{"IPv6 without brackets", "RFC 9110 7.2", get + "Host: ::1\r\n\r\n", 400},
		{"bracket left open", "RFC 9110 7.2", get + "Host: [::1\r\n\r\n", 400},
		{"text behind the bracket", "RFC 9110 7.2", get + "Host: [::1]a\r\n\r\n", 400},
		{"no IPv6 in brackets", "RFC 3986 3.2.2", get + "Host: [a]\r\n\r\n", 400},
		{"empty userinfo in Host", "RFC 9110 7.2", get + "Host: @a\r\n\r\n", 400},
		{"fragment in Host", "RFC 9110 7.2", get + "Host: a#b\r\n\r\n", 400},
		{"backslash in Host", "RFC 9110 7.2", get + "Host: a\\b\r\n\r\n", 400},
		{"escape in Host", "RFC 9110 7.2", get + "Host: %61\r\n\r\n", 400},
		{"port past 65535", "RFC 9110 7.2", get + "Host: a:65536\r\n\r\n", 400},
		{"port with a sign", "RFC 9110 7.2", get + "Host: a:+80\r\n\r\n", 400},
		{"scheme in Host", "RFC 9110 7.2", get + "Host: http://a\r\n\r\n", 400},
		{"tab in Host", "RFC 9110 7.2", get + "Host: a\tb\r\n\r\n", 400},
		{"zone in Host", "RFC 3986 3.2.2", get + "Host: [fe80::1%25eth0]\r\n\r\n", 400},
		{"two Hosts, one folded", "RFC 9112 5.2", get + "Host: a\r\n b\r\n\r\n", 400},
		{"IPv4 in brackets", "RFC 3986 3.2.2", get + "Host: [127.0.0.1]\r\n\r\n", 400},

		// framing
		{"Content-Length and Transfer-Encoding", "RFC 9112 6.1", post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"Transfer-Encoding and Content-Length", "RFC 9112 6.1", post + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400},
		{"two lengths", "RFC 9112 6.3", post + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400},
		{"the same length twice", "RFC 9112 6.3", post + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400},
		{"list of lengths", "RFC 9112 6.3", post + "Content-Length: 3, 3\r\n\r\nabc", 400},
		{"length with a plus", "RFC 9110 8.6", post + "Content-Length: +3\r\n\r\nabc", 400},
		{"length with a minus", "RFC 9110 8.6", post + "Content-Length: -3\r\n\r\nabc", 400},
		{"hexadecimal length", "RFC 9110 8.6", post + "Content-Length: 0x3\r\n\r\nabc", 400},
		{"length with a space", "RFC 9110 8.6", post + "Content-Length: 3 3\r\n\r\nabc", 400},
		{"length with letters behind", "RFC 9110 8.6", post + "Content-Length: 3a\r\n\r\nabc", 400},
		{"empty length", "RFC 9110 8.6", post + "Content-Length:\r\n\r\nabc", 400},
		{"length with a plus behind it", "RFC 9110 8.6", post + "Content-Length: 3+\r\n\r\nabc", 400},
		{"length with a point", "RFC 9110 8.6", post + "Content-Length: 3.0\r\n\r\nabc", 400},
		{"length with garbage in front", "RFC 9110 8.6", post + "Content-Length: \xa03\r\n\r\nabc", 400},
		{"length with a vertical tab in front", "RFC 9110 8.6", post + "Content-Length: \v3\r\n\r\nabc", 400},
		{"length and a comma", "RFC 9110 8.6", post + "Content-Length: 3,\r\n\r\nabc", 400},
		{"lengths in two cases", "RFC 9112 6.3", post + "Content-Length: 3\r\ncontent-length: 3\r\n\r\nabc", 400},
		{"length of a GET twice", "RFC 9112 6.3", get + "Host: a\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n", 400},
		{"length that overflows", "RFC 9110 8.6", post + "Content-Length: 18446744073709551619\r\n\r\nabc", 400},
		{"unknown coding", "RFC 9112 6.1", post + "Transfer-Encoding: gzip\r\n\r\n", 501},
		{"gzip in chunks", "RFC 9112 6.1", post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501},
		{"chunked twice in one line", "RFC 9112 6.1", post + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501},
		{"chunked twice", "RFC 9112 6.1", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"chunked and identity", "RFC 9112 6.1", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400},
		{"identity", "RFC 9112 6.1", post + "Transfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", 501},
		{"xchunked", "RFC 9112 6.1", post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501},
		{"chunked in quotes", "RFC 9112 6.1", post + "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", 501},
		{"chunked with a parameter", "RFC 9112 6.1", post + "Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 501},
		{"chunked behind a vertical tab", "RFC 9112 6.1", post + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", 400},
		{"empty Transfer-Encoding", "RFC 9112 6.1", post + "Transfer-Encoding:\r\n\r\n", 501},
		{"chunked, nothing", "RFC 9112 6.1", post + "Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", 501},
		{"chunked behind nothing", "RFC 9112 6.1", post + "Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n", 501},
		{"chunked with a NUL", "RFC 9112 6.1", post + "Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n", 400},
		{"chunked with the Kelvin sign for its k", "RFC 9112 6.1", post + "Transfer-Encoding: chun\xe2\x84\xaaed\r\n\r\n0\r\n\r\n", 501},
		{"chunked in HTTP/1.0 with a length", "RFC 9112 6.1", "POST /echo HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"chunked in HTTP/1.0", "RFC 9112 6.1", "POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},

		// chunks
		{"size that is no number", "RFC 9112 7.1", chunked + "xyz\r\n\r\n0\r\n\r\n", 400},
		{"size with a minus", "RFC 9112 7.1", chunked + "-5\r\nhello\r\n0\r\n\r\n", 400},
		{"size with a plus", "RFC 9112 7.1", chunked + "+5\r\nhello\r\n0\r\n\r\n", 400},
		{"size with 0x", "RFC 9112 7.1", chunked + "0x5\r\nhello\r\n0\r\n\r\n", 400},
		{"size with a space before", "RFC 9112 7.1", chunked + " 5\r\nhello\r\n0\r\n\r\n", 400},
		{"size with a dot", "RFC 9112 7.1", chunked + "5.\r\nhello\r\n0\r\n\r\n", 400},
		{"size with an underscore", "RFC 9112 7.1", chunked + "0_5\r\nhello\r\n0\r\n\r\n", 400},
		{"size in bytes above ASCII", "RFC 9112 7.1", chunked + "\xef\xbc\x95\r\nhello\r\n0\r\n\r\n", 400},
		{"size with a vertical tab behind", "RFC 9112 7.1", chunked + "5\v\r\nhello\r\n0\r\n\r\n", 400},
		{"size with a bare CR behind", "RFC 9112 7.1", chunked + "5\r;a\r\nhello\r\n0\r\n\r\n", 400},
		{"size with NUL behind", "RFC 9112 7.1", chunked + "5\x00\r\nhello\r\n0\r\n\r\n", 400},
		{"size with spaces and an extension", "RFC 9112 7.1", chunked + "5 ;a\r\nhello\r\n0\r\n\r\n", 400},
		{"data that ends in CR", "RFC 9112 7.1", chunked + "5\r\nhello\r0\r\n\r\n", 400},
		{"data shorter than its size", "RFC 9112 7.1", chunked + "7\r\nhello\r\n0\r\n\r\n", 400},
		{"empty size", "RFC 9112 7.1", chunked + "\r\nhello\r\n0\r\n\r\n", 400},
		{"size that overflows", "RFC 9112 7.1", chunked + "10000000000000005\r\nhello\r\n0\r\n\r\n", 400},
		{"size that ends in bare LF", "RFC 9112 7.1", chunked + "5\nhello\r\n0\r\n\r\n", 400},
		{"size that loses its last digit to a bare LF", "RFC 9112 7.1", chunked + "51\nhello\r\n0\r\n\r\n", 400},
		{"trailer that ends in bare LF", "RFC 9112 7.1.2", chunked + "5\r\nhello\r\n0\r\nX-A: 1\n\r\n", 400},
		{"data that ends in bare LF", "RFC 9112 7.1", chunked + "5\r\nhello\n0\r\n\r\n", 400},
		{"data longer than its size", "RFC 9112 7.1", chunked + "5\r\nhello!\r\n0\r\n\r\n", 400},
		{"data longer, and no line behind", "RFC 9112 7.1", chunked + "5\r\nhello!!", 400},
		{"bare LF in an extension", "RFC 9112 7.1.1", chunked + "5;a\nb\r\nhello\r\n0\r\n\r\n", 400},
		{"bare CR in an extension", "RFC 9112 7.1.1", chunked + "5;a\rb\r\nhello\r\n0\r\n\r\n", 400},
		{"NUL in an extension", "RFC 9112 7.1.1", chunked + "5;a\x00b\r\nhello\r\n0\r\n\r\n", 400},
		{"long extension", "RFC 9112 7.1.1", chunked + "5;" + strings.Repeat("x", maxChunkLine) + "\r\nhello\r\n0\r\n\r\n", 400},
		{"bare LF behind the last chunk", "RFC 9112 7.1", chunked + "5\r\nhello\r\n0\r\n\n", 400},
		{"trailer without a name", "RFC 9112 7.1.2", chunked + "5\r\nhello\r\n0\r\n: x\r\n\r\n", 400},
		{"trailer with a space in its name", "RFC 9112 7.1.2", chunked + "5\r\nhello\r\n0\r\nX A: x\r\n\r\n", 400},
		{"folded trailer", "RFC 9112 7.1.2", chunked + "5\r\nhello\r\n0\r\nX-A: x\r\n y\r\n\r\n", 400},
		{"trailers past the limit", "RFC 9112 7.1.2", chunked + "0\r\n" + strings.Repeat("X-A: 1\r\n", maxTrailers/8+1) + "\r\n", 400},

		{"two Max-Forwards", "RFC 9110 7.6.2", "OPTIONS /echo HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\nMax-Forwards: 5\r\n\r\n", 400},
		{"Max-Forwards that is no number", "RFC 9110 7.6.2", "OPTIONS /echo HTTP/1.1\r\nHost: a\r\nMax-Forwards: -1\r\n\r\n", 400},
	}
	g := startGateway(t, nil, nil)
	o, came := untouched(t)
	g.register(t, "echo", "1", o.url())
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			c.send(row.request + smuggled)
			m := c.read(false)
			if m.status() != row.status {
				t.Errorf("%s: status %d, want %d: %s", row.source, m.status(), row.status, m.body)
			}
			if m.field("Connection") != "close" || !strings.HasPrefix(m.field("Proxy-Status"), "kerberos; error=http_request_") {
				t.Errorf("head:\n%s", m.head)
			}
			c.closed()
		})
	}
	if n := came.Load(); n != 0 {
		t.Errorf("%d requests went on", n)
	}
}

// What is refused, or answered by the gateway itself, although it is clear where the next request begins: the connection
// goes on.
func TestAnsweredHere(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.HealthPath, cfg.Upgrades = "/-/health", []string{} }, nil)
	o, came := untouched(t)
	g.register(t, "echo", "1", o.url())
	g.register(t, "users", "1", o.url())
	const allow = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
	const websocket = "GET /echo HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\n"
	rows := []struct {
		name, source, request string
		status                int
		kind, allow           string
	}{
		{"TRACE", "RFC 9110 9.3.8", "TRACE /echo HTTP/1.1\r\nHost: a\r\n\r\n", 405, "http_request_denied", allow},
		{"trace", "RFC 9110 9.3.8", "trace /echo HTTP/1.1\r\nHost: a\r\n\r\n", 405, "http_request_denied", allow},
		{"OPTIONS *", "RFC 9110 9.3.7", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 200, "", allow},
		{"OPTIONS of a host", "RFC 9112 3.2.4", "OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n", 200, "", allow},
		{"Max-Forwards used up", "RFC 9110 7.6.2", "OPTIONS /echo HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", 200, "", allow},
		{"unknown expectation", "RFC 9110 10.1.1", "GET /echo HTTP/1.1\r\nHost: a\r\nExpect: foo\r\n\r\n", 417, "http_request_denied", ""},
		{"expectation with more", "RFC 9110 10.1.1", "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue, foo\r\n\r\nab", 417, "http_request_denied", ""},
		{"WebSocket", "RFC 6455 4.1", websocket + "Upgrade: websocket\r\n\r\n", 501, "http_upgrade_failed", ""},
		{"WebSocket in capitals", "RFC 6455 4.1", websocket + "Upgrade: WebSocket\r\n\r\n", 501, "http_upgrade_failed", ""},
		{"WebSocket among others", "RFC 9110 7.8", websocket + "Upgrade: h2c, websocket\r\n\r\n", 501, "http_upgrade_failed", ""},
		{"loop", "RFC 9110 7.6.3", "GET /echo HTTP/1.1\r\nHost: a\r\nVia: 1.0 x, 1.1 " + string(g.pseudonym) + "\r\n\r\n", 508, "proxy_loop_detected", ""},
		{"no such service", "", "GET /nobody HTTP/1.1\r\nHost: a\r\n\r\n", 404, "destination_not_found", ""},
		{"no service at all", "", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404, "destination_not_found", ""},
		{"no such service, with a body", "", "POST /nobody HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 404, "destination_not_found", ""},
		{"health", "", "GET /-/health HTTP/1.1\r\nHost: a\r\n\r\n", 200, "", ""},

		// paths that lead elsewhere once they are resolved
		{"dots to another service", "", "GET /echo/../users HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"encoded dots", "", "GET /echo/%2e%2E/users HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"dots and an encoded slash", "", "GET /echo/..%2fusers HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"backslashes", "", "GET /echo\\..\\users HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"encoded backslashes", "", "GET /echo/..%5cusers HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"parameters", "", "GET /echo/..;x=1/users HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"dots first", "", "GET /./users HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"encoded letters", "", "GET /%65cho HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"above the root", "", "GET /../echo HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
		{"above the root and back", "", "GET /echo/../../echo HTTP/1.1\r\nHost: a\r\n\r\n", 400, "http_request_denied", ""},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			c.send(row.request)
			c.send("GET /-/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
			m := c.read(false)
			if m.status() != row.status || m.field("Connection") != "" || m.field("Allow") != row.allow {
				t.Errorf("%s: want %d:\n%s", row.source, row.status, m.head)
			}
			want := ""
			if row.kind != "" {
				want = "kerberos; error=" + row.kind
			}
			if got := m.field("Proxy-Status"); got != want {
				t.Errorf("Proxy-Status %q, want %q", got, want)
			}
			if m := c.read(false); m.status() != 200 || m.body != "ready\n" {
				t.Errorf("the next request: %d %q", m.status(), m.body)
			}
			c.closed()
		})
	}
	if n := came.Load(); n != 0 {
		t.Errorf("%d requests went on", n)
	}
}

// ours is what the gateway adds to a request from a peer on the loopback that it does not trust.
func ours(host string, minor int) string {
	return fmt.Sprintf("X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: %s\r\nVia: 1.%d {via}\r\n",
		host, minor)
}

// What reaches the backend, to the byte.
func TestForwardedRequests(t *testing.T) {
	const host = "Host: a\r\n"
	get := func(target, fields string) string { return "GET " + target + " HTTP/1.1\r\n" + host + fields + "\r\n" }
	seen := func(target, fields string) string {
		return "GET " + target + " HTTP/1.1\r\n" + host + fields + ours("a", 1) + "\r\n"
	}
	post := func(fields, body string) string {
		return "POST /echo HTTP/1.1\r\n" + host + fields + "\r\n" + body
	}
	rows := []struct {
		name, source string
		request      string
		head         string // as the origin sees it
		body         string
		trailer      string
		connection   string // of the response: "" goes on
	}{
		// targets
		{name: "path", request: get("/echo", ""), head: seen("/echo", "")},
		{name: "path below", request: get("/echo/x/y", ""), head: seen("/echo/x/y", "")},
		{name: "escapes stay", request: get("/echo/%2F%20%e2%82%ac", ""), head: seen("/echo/%2F%20%e2%82%ac", "")},
		{name: "broken escapes stay", request: get("/echo/%zz%", ""), head: seen("/echo/%zz%", "")},
		{name: "empty segments stay", request: get("/echo//x//", ""), head: seen("/echo//x//", "")},
		{name: "parameters stay", request: get("/echo/a;b=c", ""), head: seen("/echo/a;b=c", "")},
		{name: "raw UTF-8", request: get("/echo/\xe2\x82\xac", ""), head: seen("/echo/\xe2\x82\xac", "")},
		{name: "odd but visible", request: get("/echo/\"<>[]^`{|}~!$&'()*+,:=@", ""), head: seen("/echo/\"<>[]^`{|}~!$&'()*+,:=@", "")},
		{name: "dots within the service", request: get("/echo/a/../b/./c", ""), head: seen("/echo/a/../b/./c", "")},
		{name: "empty query", request: get("/echo?", ""), head: seen("/echo?", "")},
		{name: "query", request: get("/echo?a=b&c=%20;d=../..?\\", ""), head: seen("/echo?a=b&c=%20;d=../..?\\", "")},
		{name: "URL in the query", request: get("/echo?u=http://b/../x", ""), head: seen("/echo?u=http://b/../x", "")},

		// absolute-form
		{name: "absolute", source: "RFC 9112 3.2.2", request: "GET http://b.example/echo/x?y HTTP/1.1\r\nX-A: 1\r\nHost: ignored\r\nX-B: 2\r\n\r\n",
			head: "GET /echo/x?y HTTP/1.1\r\nHost: b.example\r\nX-A: 1\r\nX-B: 2\r\n" + ours("b.example", 1) + "\r\n"},
		{name: "absolute, https and a port", source: "RFC 9112 3.2.2", request: "GET HTTPS://b.example:8443/echo HTTP/1.1\r\nHost: a\r\n\r\n",
			head: "GET /echo HTTP/1.1\r\nHost: b.example:8443\r\n" + ours("b.example:8443", 1) + "\r\n"},
		{name: "absolute, Host not valid", source: "RFC 9112 3.2.2", request: "GET http://b/echo HTTP/1.1\r\nHost: u@a\r\n\r\n",
			head: "GET /echo HTTP/1.1\r\nHost: b\r\n" + ours("b", 1) + "\r\n"},
		{name: "absolute, HTTP/1.0 without Host", source: "RFC 9112 3.2.2", request: "GET http://b/echo HTTP/1.0\r\n\r\n", connection: "close",
			head: "GET /echo HTTP/1.1\r\nHost: b\r\n" + ours("b", 0) + "\r\n"},

		// Host
		{name: "Host with a port", request: "GET /echo HTTP/1.1\r\nhOsT: A.Example:8080\r\n\r\n",
			head: "GET /echo HTTP/1.1\r\nhOsT: A.Example:8080\r\n" + ours("A.Example:8080", 1) + "\r\n"},
		{name: "Host IPv6", request: "GET /echo HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
			head: "GET /echo HTTP/1.1\r\nHost: [::1]:80\r\n" + ours("[::1]:80", 1) + "\r\n"},

		// HTTP/1.0
		{name: "HTTP/1.0", source: "RFC 9112 9.3", request: "GET /echo HTTP/1.0\r\nHost: a\r\n\r\n", connection: "close",
			head: "GET /echo HTTP/1.1\r\nHost: a\r\n" + ours("a", 0) + "\r\n"},
		{name: "HTTP/1.0 without Host", source: "RFC 9112 3.2", request: "GET /echo HTTP/1.0\r\n\r\n", connection: "close",
			head: "GET /echo HTTP/1.1\r\nHost: {origin}\r\n" + strings.Replace(ours("", 0), "X-Forwarded-Host: \r\n", "", 1) + "\r\n"},
		{name: "HTTP/1.0 keep-alive", source: "RFC 9112 9.3", request: "GET /echo HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n", connection: "keep-alive",
			head: "GET /echo HTTP/1.1\r\nHost: a\r\n" + ours("a", 0) + "\r\n"},
		{name: "HTTP/1.0 ignores Expect", source: "RFC 9110 10.1.1", request: "GET /echo HTTP/1.0\r\nHost: a\r\nExpect: foo\r\n\r\n", connection: "close",
			head: "GET /echo HTTP/1.1\r\nHost: a\r\n" + ours("a", 0) + "\r\n"},

		// methods
		{name: "method in lower case", source: "RFC 9110 9.1", request: "get /echo HTTP/1.1\r\n" + host + "\r\n", head: "get /echo HTTP/1.1\r\n" + host + ours("a", 1) + "\r\n"},
		{name: "unknown method", source: "RFC 9110 9.1", request: "M-SEARCH /echo HTTP/1.1\r\n" + host + "\r\n", head: "M-SEARCH /echo HTTP/1.1\r\n" + host + ours("a", 1) + "\r\n"},
		{name: "OPTIONS with Max-Forwards", source: "RFC 9110 7.6.2", request: "OPTIONS /echo HTTP/1.1\r\n" + host + "Max-Forwards: 7\r\n\r\n",
			head: "OPTIONS /echo HTTP/1.1\r\n" + host + ours("a", 1) + "Max-Forwards: 6\r\n\r\n"},
		{name: "GET with Max-Forwards", source: "RFC 9110 7.6.2", request: get("/echo", "Max-Forwards: x\r\n"), head: seen("/echo", "Max-Forwards: x\r\n")},

		// fields
		{name: "order and case", request: get("/echo", "b: 2\r\nA: 1\r\nB: 3\r\nx-mIxEd: y\r\nCookie: a=1\r\nCookie: b=2\r\nAccept:\r\n"),
			head: seen("/echo", "b: 2\r\nA: 1\r\nB: 3\r\nx-mIxEd: y\r\nCookie: a=1\r\nCookie: b=2\r\nAccept:\r\n")},
		{name: "white space and bytes above ASCII in values", request: get("/echo", "X-A: \t x\ty  \r\nX-B:z\r\nX-C: \xe4\xff\r\n"),
			head: seen("/echo", "X-A: \t x\ty  \r\nX-B:z\r\nX-C: \xe4\xff\r\n")},
		{name: "hop-by-hop", source: "RFC 9110 7.6.1",
			request: get("/echo", "Keep-Alive: 5\r\nX-A: 1\r\nTE: trailers\r\nProxy-Connection: keep-alive\r\nUpgrade: h2c\r\nProxy-Authorization: x\r\nX-B: 2\r\nProxy-Authenticate: y\r\n"),
			head:    seen("/echo", "X-A: 1\r\nX-B: 2\r\n")},
		{name: "nominated", source: "RFC 9110 7.6.1",
			request: get("/echo", "X-Before: 1\r\nConnection: x-before , X-AFTER,,keep-alive\r\nX-After: 2\r\nX-Left: 3\r\nconnection: X-More\r\nX-more: 4\r\n"),
			head:    seen("/echo", "X-Left: 3\r\n")},
		{name: "Host and Content-Length are not nominated away", source: "RFC 9110 7.6.1", request: post("Connection: Host, Content-Length\r\nContent-Length: 3\r\n", "abc"),
			head: "POST /echo HTTP/1.1\r\n" + host + "Content-Length: 3\r\n" + ours("a", 1) + "\r\n", body: "abc"},
		{name: "our fields are not nominated away", source: "RFC 9110 7.6.1", request: get("/echo", "Connection: X-Forwarded-For, Via, X-Real-IP\r\nX-Forwarded-For: 1.2.3.4\r\n"),
			head: seen("/echo", "")},
		{name: "Transfer-Encoding is not nominated away", source: "RFC 9110 7.6.1", request: post("Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
			head: "POST /echo HTTP/1.1\r\n" + host + ours("a", 1) + "Transfer-Encoding: chunked\r\n\r\n", body: "abc"},
		{name: "twins with underscores", request: get("/echo", "X_Forwarded_For: 1\r\nX-Forwarded_Proto: https\r\nTransfer_Encoding: chunked\r\nContent_Length: 7\r\nX_Real_IP: 1\r\nx-real_ip: 1\r\nx_forwarded-for: 1\r\nX_Forwarded_Host: b\r\nX_FORWARDED_PORT: 1\r\nMax_Forwards: 0\r\nKeep_Alive: 1\r\nProxy_Authorization: x\r\nProxy_Connection: x\r\ntransfer_encoding: gzip\r\nX_Other: stays\r\nHOST_: x\r\n"),
			head: seen("/echo", "X_Other: stays\r\nHOST_: x\r\n")},
		{name: "Via is kept", source: "RFC 9110 7.6.3", request: get("/echo", "Via: 1.1 other\r\n"), head: seen("/echo", "Via: 1.1 other\r\n")},
		{name: "close is ours, not the backend's", source: "RFC 9112 9.6", request: get("/echo", "Connection: close\r\n"), head: seen("/echo", ""), connection: "close"},
		{name: "keep-alive asked for", source: "RFC 9112 9.3", request: get("/echo", "Connection: keep-alive\r\n"), head: seen("/echo", "")},

		// bodies
		{name: "length", request: post("Content-Length: 5\r\nX-A: 1\r\n", "hello"), body: "hello",
			head: "POST /echo HTTP/1.1\r\n" + host + "Content-Length: 5\r\nX-A: 1\r\n" + ours("a", 1) + "\r\n"},
		{name: "length 0", request: post("Content-Length: 0\r\n", ""),
			head: "POST /echo HTTP/1.1\r\n" + host + "Content-Length: 0\r\n" + ours("a", 1) + "\r\n"},
		{name: "length with zeros in front", source: "RFC 9110 8.6", request: post("Content-Length: 0005\r\n", "hello"), body: "hello",
			head: "POST /echo HTTP/1.1\r\n" + host + ours("a", 1) + "Content-Length: 5\r\n\r\n"},
		{name: "GET with a body", source: "RFC 9110 9.3.1", request: get("/echo", "Content-Length: 5\r\n") + "hello", body: "hello", head: seen("/echo", "Content-Length: 5\r\n")},
		{name: "chunks", source: "RFC 9112 7.1", request: post("Transfer-Encoding: Chunked\r\n", "2\r\nhe\r\n3;x=\"y\"\r\nllo\r\n000\r\n\r\n"), body: "hello",
			head: "POST /echo HTTP/1.1\r\n" + host + ours("a", 1) + "Transfer-Encoding: chunked\r\n\r\n"},
		{name: "chunks, none", source: "RFC 9112 7.1", request: post("Transfer-Encoding: chunked\r\n", "0\r\n\r\n"),
			head: "POST /echo HTTP/1.1\r\n" + host + ours("a", 1) + "Transfer-Encoding: chunked\r\n\r\n"},
		{name: "trailers", source: "RFC 9110 6.5", request: post("Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n",
			"5\r\nhello\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\nHost: b\r\nX_Forwarded_For: 1\r\nx-Other: 2\r\n\r\n"),
			body: "hello", trailer: "X-Sum: 1\r\nx-Other: 2\r\n",
			head: "POST /echo HTTP/1.1\r\n" + host + "Trailer: X-Sum\r\n" + ours("a", 1) + "Transfer-Encoding: chunked\r\n\r\n"},
		{name: "Expect with the body at once", source: "RFC 9110 10.1.1", request: post("Expect: 100-Continue\r\nContent-Length: 5\r\n", "hello"), body: "hello",
			head: "POST /echo HTTP/1.1\r\n" + host + "Content-Length: 5\r\n" + ours("a", 1) + "\r\n"},
		{name: "Expect without a body", source: "RFC 9110 10.1.1", request: get("/echo", "Expect: 100-continue\r\n"), head: seen("/echo", "")},
	}
	g := startGateway(t, nil, nil)
	o := naming(t, "ok ")
	g.register(t, "echo", "1", o.url())
	fill := strings.NewReplacer("{via}", string(g.pseudonym), "{origin}", o.Addr().String())
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			before := len(o.requests())
			c := g.dial(t)
			c.send("\r\n" + row.request)
			m := c.read(false)
			if m.status() != 200 || m.body != "ok "+row.body {
				t.Fatalf("%s: %d %q", row.source, m.status(), m.body)
			}
			got := o.requests()[before:]
			want := []*message{{head: fill.Replace(row.head), body: row.body, trailer: row.trailer, chunked: strings.Contains(row.head, "chunked\r\n\r\n")}}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(message{})); diff != "" {
				t.Errorf("%s: the backend saw (-want +got):\n%s", row.source, diff)
			}
			if got := m.field("Connection"); got != row.connection {
				t.Errorf("Connection: %q, want %q", got, row.connection)
			}
			if row.connection != "close" {
				c.send("GET /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				c.read(false)
			}
			c.closed()
		})
	}
}

// A target that looks like it had an authority has none: it goes where path and Host say.
func TestConfusableTargets(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Routes = parseRoutes("/=echo /admin=admin")
		cfg.NoVia = true
	}, nil)
	o := naming(t, "ok")
	admin, came := untouched(t)
	g.register(t, "echo", "1", o.url())
	g.register(t, "admin", "1", admin.url())
	for _, target := range []string{
		"//evil.example/admin", "//evil.example/admin?://", "///admin", "/http://evil.example/admin", "/?http://evil.example/admin",
		"http://evil.example//admin", "http://evil.example?/admin",
	} {
		t.Run(target, func(t *testing.T) {
			m := g.do(t, "GET "+target+" HTTP/1.1\r\nHost: a\r\n\r\n")
			if m.status() != 200 {
				t.Fatal(m.head)
			}
			seen := o.requests()
			host, origin := "a", target
			if rest, ok := strings.CutPrefix(target, "http://evil.example"); ok {
				host, origin = "evil.example", "/"+strings.TrimPrefix(rest, "/")
			}
			want := "GET " + origin + " HTTP/1.1\r\nHost: " + host + "\r\n"
			if got := seen[len(seen)-1].head; !strings.HasPrefix(got, want) {
				t.Errorf("the backend saw %q, want %q...", got, want)
			}
		})
	}
	if n := came.Load(); n != 0 {
		t.Errorf("%d requests went to /admin", n)
	}
}

// The addr of an instance may have a base path.
func TestBasePath(t *testing.T) {
	g := startGateway(t, nil, nil)
	o := naming(t, "ok")
	g.register(t, "echo", "1", o.url()+"/v1/")
	for _, row := range []struct{ target, want string }{{"/echo", "/v1/echo"}, {"/echo/%2f?a=/", "/v1/echo/%2f?a=/"}, {"http://b/echo", "/v1/echo"}} {
		g.do(t, "GET "+row.target+" HTTP/1.1\r\nHost: a\r\n\r\n")
		seen := o.requests()
		if got := strings.Fields(seen[len(seen)-1].head)[1]; got != row.want {
			t.Errorf("%s reached the backend as %s, want %s", row.target, got, row.want)
		}
	}
}

// Who the client is, and what the backend is told of it: decision 8 of the design.
func TestForwardingFields(t *testing.T) {
	const untrusted = "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a\r\n"
	trusted := func(xff, real string) string {
		return "X-Forwarded-For: " + xff + "127.0.0.1\r\nX-Real-IP: " + real + "\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a\r\n"
	}
	rows := []struct {
		name    string
		trust   string // networks
		fields  string
		seen    string // behind Host
		address string // of the client
	}{
		{"untrusted", "", "", untrusted, "127.0.0.1"},
		{"untrusted, forged", "", "X-Forwarded-For: 1.1.1.1, 2.2.2.2, 3.3.3.3\r\nX-A: 1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: b\r\n" +
			"X-Forwarded-Port: 1\r\nX-Forwarded-Anything: 1\r\nForwarded: for=1.1.1.1\r\nX-Real-IP: 1.1.1.1\r\nx-FORWARDED-for: 4.4.4.4\r\n",
			"X-A: 1\r\n" + untrusted, "127.0.0.1"},
		{"another network is trusted", "10.0.0.0/8 ::1/128", "X-Forwarded-For: 1.1.1.1\r\n", untrusted, "127.0.0.1"},

		{"trusted", "127.0.0.0/8", "", trusted("", "127.0.0.1"), "127.0.0.1"},
		{"trusted, one entry", "127.0.0.0/8", "X-Forwarded-For: 1.1.1.1\r\n", trusted("1.1.1.1, ", "1.1.1.1"), "1.1.1.1"},
		{"three forged entries", "127.0.0.0/8", "X-Forwarded-For: 1.1.1.1, 2.2.2.2, 3.3.3.3, 9.9.9.9\r\n",
			trusted("1.1.1.1, 2.2.2.2, 3.3.3.3, 9.9.9.9, ", "9.9.9.9"), "9.9.9.9"},
		{"a chain of trusted ones", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 1.1.1.1, 9.9.9.9, 10.1.1.1,10.2.2.2\r\n",
			trusted("1.1.1.1, 9.9.9.9, 10.1.1.1,10.2.2.2, ", "9.9.9.9"), "9.9.9.9"},
		{"all lines in order", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 1.1.1.1\r\nX-A: 1\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-For: 10.1.1.1\r\n",
			"X-A: 1\r\n" + trusted("1.1.1.1, 9.9.9.9, 10.1.1.1, ", "9.9.9.9"), "9.9.9.9"},
		{"all are trusted", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 10.1.1.1, 10.2.2.2\r\n", trusted("10.1.1.1, 10.2.2.2, ", "10.1.1.1"), "10.1.1.1"},
		{"garbage ends the walk", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 1.1.1.1, unknown, 10.1.1.1\r\n", trusted("1.1.1.1, unknown, 10.1.1.1, ", "10.1.1.1"), "10.1.1.1"},
		{"garbage alone", "127.0.0.0/8", "X-Forwarded-For: <script>\r\n", trusted("<script>, ", "127.0.0.1"), "127.0.0.1"},
		{"a zone is garbage", "127.0.0.0/8", "X-Forwarded-For: fe80::1%eth0\r\n", trusted("fe80::1%eth0, ", "127.0.0.1"), "127.0.0.1"},
		{"an empty entry is garbage", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 1.1.1.1,,10.1.1.1\r\n", trusted("1.1.1.1,,10.1.1.1, ", "10.1.1.1"), "10.1.1.1"},
		{"ports", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: 9.9.9.9:1234, 10.1.1.1:80\r\n", trusted("9.9.9.9:1234, 10.1.1.1:80, ", "9.9.9.9"), "9.9.9.9"},
		{"IPv6", "127.0.0.0/8", "X-Forwarded-For: 2001:DB8::1\r\n", trusted("2001:DB8::1, ", "2001:db8::1"), "2001:db8::1"},
		{"IPv6 in brackets", "127.0.0.0/8", "X-Forwarded-For: [2001:db8::1]\r\n", trusted("[2001:db8::1], ", "2001:db8::1"), "2001:db8::1"},
		{"IPv4 in brackets", "127.0.0.0/8", "X-Forwarded-For: [192.0.2.1]\r\n", trusted("[192.0.2.1], ", "127.0.0.1"), "127.0.0.1"},
		{"IPv6 with a port", "127.0.0.0/8", "X-Forwarded-For: [2001:db8::1]:80\r\n", trusted("[2001:db8::1]:80, ", "2001:db8::1"), "2001:db8::1"},
		{"IPv4-mapped", "127.0.0.0/8 10.0.0.0/8", "X-Forwarded-For: ::ffff:9.9.9.9, ::ffff:10.1.1.1\r\n",
			trusted("::ffff:9.9.9.9, ::ffff:10.1.1.1, ", "9.9.9.9"), "9.9.9.9"},
		{"the others are kept", "127.0.0.0/8", "x-forwarded-proto: https\r\nX-Forwarded-Host: b\r\nX-Forwarded-Port: 443\r\nForwarded: for=1.1.1.1\r\nX-Real-IP: 6.6.6.6\r\n",
			"x-forwarded-proto: https\r\nX-Forwarded-Host: b\r\nX-Forwarded-Port: 443\r\nForwarded: for=1.1.1.1\r\nX-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n", "127.0.0.1"},
		{"twins with underscores are not", "127.0.0.0/8", "X_Forwarded_For: 1.1.1.1\r\n", trusted("", "127.0.0.1"), "127.0.0.1"},
	}
	o := naming(t, "ok")
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			var client string
			g := startGateway(t, func(cfg *Config) {
				cfg.NoVia = true
				for _, network := range strings.Fields(row.trust) {
					cfg.TrustedProxies = append(cfg.TrustedProxies, netip.MustParsePrefix(network))
				}
			}, func(r *Request) string {
				client = r.Client.String()
				return "echo"
			})
			g.register(t, "echo", "1", o.url())
			g.do(t, "GET / HTTP/1.1\r\nHost: a\r\n"+row.fields+"\r\n")
			seen := o.requests()
			want := "GET / HTTP/1.1\r\nHost: a\r\n" + row.seen + "\r\n"
			if diff := cmp.Diff(want, seen[len(seen)-1].head); diff != "" {
				t.Errorf("the backend saw (-want +got):\n%s", diff)
			}
			if client != row.address {
				t.Errorf("the client is %s, want %s", client, row.address)
			}
		})
	}
}

// addressed is a connection that says it comes from elsewhere.
type addressed struct {
	net.Conn
	remote net.Addr
}

func (c addressed) RemoteAddr() net.Addr { return c.remote }

// A peer that a dual-stack socket shows as IPv4-mapped is the IPv4 client that it is; a zone is no part of an address.
func TestPeerAddress(t *testing.T) {
	for remote, want := range map[string]string{"[::ffff:192.0.2.1]:1": "192.0.2.1", "192.0.2.1:1": "192.0.2.1", "[fe80::1%eth0]:1": "fe80::1", "[2001:db8::1]:1": "2001:db8::1"} {
		seen := make(chan string, 1)
		g := startGateway(t, func(cfg *Config) { cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} }, func(r *Request) string {
			seen <- r.Client.String()
			return ""
		})
		near, far := net.Pipe()
		defer near.Close()
		g.accepted(addressed{far, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(remote))})
		c := &client{t: t, Conn: near, r: bufio.NewReader(near)}
		c.send("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.1\r\n\r\n")
		c.read(false)
		if want == "192.0.2.1" {
			want = "203.0.113.1" // it is trusted under both names
		}
		if got := <-seen; got != want {
			t.Errorf("%s is %s, want %s", remote, got, want)
		}
	}
}

// Requests that come together are answered in order, the gateway's own answers among them.
func TestPipelining(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.API = registry.NewHandler(cfg.Registry, nil) }, nil)
	o := naming(t, "ok ")
	g.register(t, "echo", "1", o.url())
	const registration = `{"service":"late","id":"1","addr":"http://localhost:1"}`
	c := g.dial(t)
	c.send("GET /echo/1 HTTP/1.1\r\nHost: localhost\r\n\r\n" +
		"\r\nPOST /echo/2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\ntwo" +
		"\r\n\r\nPOST /echo/3 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nthree\r\n0\r\nX-T: 1\r\n\r\n" +
		"GET /services/echo HTTP/1.1\r\nHost: localhost\r\n\r\n" +
		fmt.Sprintf("POST /register HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(registration), registration) +
		fmt.Sprintf("POST /register HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(registration), registration) +
		"GET /nobody HTTP/1.1\r\nHost: localhost\r\n\r\n" +
		"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n" +
		"HEAD /services HTTP/1.1\r\nHost: localhost\r\n\r\n" +
		strings.Repeat("GET /echo HTTP/1.1\r\nHost: localhost\r\n\r\n", 500) +
		"GET /echo/last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" + smuggled)
	want := []struct {
		status int
		body   string
	}{{200, "ok "}, {200, "ok two"}, {200, "ok three"}, {200, ""}, {204, ""}, {204, ""}, {404, ""}, {200, ""}, {200, ""}}
	for i, w := range want {
		m := c.read(i == 8)
		if m.status() != w.status || w.body != "" && m.body != w.body {
			t.Fatalf("response %d: %d %q, want %d %q", i+1, m.status(), m.body, w.status, w.body)
		}
		if i == 3 && !strings.Contains(m.body, `"name":"echo"`) {
			t.Errorf("GET /services/echo: %s", m.body)
		}
	}
	for range 501 {
		if m := c.read(false); m.status() != 200 {
			t.Fatal(m.head)
		}
	}
	c.closed()
	if g.reg.Snapshot("late") == nil {
		t.Error("the registration among them had no effect")
	}
	for _, m := range o.requests() {
		if strings.Contains(m.head, "smuggled") {
			t.Error("a request behind the last one was served")
		}
	}
}

// Requests that fill the buffer to its last byte don't hide those behind them.
func TestPipeliningFillsBuffer(t *testing.T) {
	const size = firstBuffer / 32
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", naming(t, "ok").url())
	c := g.dial(t)
	c.send(strings.Repeat(sized(size), 200))
	for range 200 {
		if m := c.read(false); m.body != "ok" {
			t.Fatal(m.head)
		}
	}
}

// A client may take its time, and its segments may end anywhere.
func TestHeadInPieces(t *testing.T) {
	g := startGateway(t, nil, nil)
	o := naming(t, "ok ")
	g.register(t, "echo", "1", o.url())
	const request = "\r\n\r\nPOST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"
	c := g.dial(t)
	for range 2 {
		for i := range request {
			c.send(request[i : i+1])
		}
		if m := c.read(false); m.body != "ok hello" {
			t.Fatalf("%s%s", m.head, m.body)
		}
	}
	for _, m := range o.requests() {
		if m.body != "hello" || m.trailer != "X-T: 1\r\n" {
			t.Errorf("the backend saw %+v", m)
		}
	}
}

// sized returns a request with a head of n bytes.
func sized(n int) string {
	const start, end = "GET /echo HTTP/1.1\r\nHost: a\r\nX-A: ", "\r\n\r\n"
	return start + strings.Repeat("x", n-len(start)-len(end)) + end
}

func TestHeadLimit(t *testing.T) {
	g := startGateway(t, nil, nil)
	o := naming(t, "ok")
	g.register(t, "echo", "1", o.url())
	for _, row := range []struct {
		name   string
		bytes  string
		status []int
	}{
		{"at the limit", sized(maxHead), []int{200}},
		{"one past it", sized(maxHead + 1), []int{431}},
		{"far past it", sized(20 * maxHead), []int{431}},
		{"at the limit, a small one before and behind", sized(100) + sized(maxHead) + sized(100), []int{200, 200, 200}},
		{"at the limit, twice", sized(maxHead) + sized(maxHead), []int{200, 200}},
		{"past it behind others", sized(maxHead-1) + sized(5000) + sized(maxHead+1), []int{200, 200, 431}},
		{"fields without end", "GET /echo HTTP/1.1\r\n" + strings.Repeat("X-A: 1\r\n", maxHead/8), []int{431}},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			go c.Write([]byte(row.bytes)) // not all of what is refused is read
			for _, want := range row.status {
				if m := c.read(false); m.status() != want {
					t.Fatalf("status %d, want %d", m.status(), want)
				}
			}
			if row.status[len(row.status)-1] == 431 {
				c.closed()
			}
		})
	}
}

// A head that is refused whatever may follow is not waited for.
func TestBareLFAtOnce(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, start := range []string{"GET /echo HTTP/1.1\nHost: a\n\n", "GET /echo HTTP/1.1\r\nHost: a\r\n\n", "\n"} {
		began := time.Now()
		if m := g.do(t, start); m.status() != 400 {
			t.Errorf("%q: %s", start, m.head)
		}
		if took := time.Since(began); took > headTimeout/2 {
			t.Errorf("%q was waited for: %v", start, took)
		}
	}
}

// What a client still sends behind a refusal is read for a while: a reset could overtake the answer.
func TestRefusalOutlastsTheClient(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, request := range []string{"GET / HTTP/1.1\r\n\r\n", sized(2 * maxHead), "POST /nobody HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"} {
		c := g.dial(t)
		c.send(request)
		m := c.read(false)
		for range 20 { // without it the first of these is answered by a reset, and the others fail
			c.send(strings.Repeat("x", 1000))
			time.Sleep(time.Millisecond)
		}
		if m.status() < 400 || m.field("Connection") != "close" {
			t.Error(m.head)
		}
		c.closed()
	}
}

// A refusal has a body that fits its Content-Length, whatever the request before it was.
func TestRefusalBehindHead(t *testing.T) {
	g := startGateway(t, nil, nil)
	o := answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send("HEAD /echo HTTP/1.1\r\nHost: a\r\nX-A: " + strings.Repeat("x", 5*firstBuffer) + "\r\n\r\n")
	c.read(true)
	go c.Write([]byte(sized(maxHead + 1)))
	if m := c.read(false); m.status() != 431 {
		t.Error(m.head)
	}
	c.closed()
}

// An upload that waits for 100-continue gets it, unless it is of no use.
func TestExpectContinue(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.API = registry.NewHandler(cfg.Registry, nil) }, nil)
	o := naming(t, "ok ")
	g.register(t, "echo", "1", o.url())
	g.register(t, "gone", "1", o.url())
	if err := g.reg.Unregister("gone", "1", ""); err != nil {
		t.Fatal(err)
	}
	const expect = "Host: a\r\nExpect: 100-continue\r\n"
	large := strings.Repeat("x", maxHeld+1)
	for _, row := range []struct{ name, head, body, want string }{
		{"small", "POST /echo HTTP/1.1\r\n" + expect + "Content-Length: 5\r\n\r\n", "hello", "ok hello"},
		{"large", fmt.Sprintf("POST /echo HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n", expect, len(large)), large, "ok " + large},
		{"chunks", "POST /echo HTTP/1.1\r\n" + expect + "Transfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n", "ok hello"},
		{"API", "POST /register HTTP/1.1\r\n" + expect + "Content-Length: 1\r\n\r\n", "{", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			c.send(row.head)
			if m := c.next(false); m.head != "HTTP/1.1 100 Continue\r\n\r\n" {
				t.Fatal(m.head)
			}
			c.send(row.body)
			if m := c.read(false); row.want != "" && m.body != row.want {
				t.Errorf("%s%.100s", m.head, m.body)
			}
		})
	}
	for _, row := range []struct {
		name, path string
		status     int
	}{{"no such service", "/nobody", 404}, {"no instance", "/gone", 503}, {"elsewhere", "/echo/../x", 400}} {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			c.send("POST " + row.path + " HTTP/1.1\r\n" + expect + "Content-Length: 5\r\n\r\n")
			if m := c.read(false); m.status() != row.status || m.field("Connection") != "close" {
				t.Error(m.head)
			}
			c.closed()
		})
	}
}

// What a client may take its time for, on a clock that does not wait: connections are pipes.
func TestClientTimeouts(t *testing.T) {
	const request = "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"
	drip := func(c *client, bytes string, n int) {
		for range n {
			c.send(bytes)
			time.Sleep(time.Second)
		}
	}
	rows := []struct {
		name   string
		script func(c *client)
		after  time.Duration // the script's end
		status int           // 0: closed without a word
	}{
		{"sends nothing", func(*client) {}, firstByteTimeout, 0},
		{"sends empty lines", func(c *client) { c.send("\r\n\r\n") }, firstByteTimeout, 0},
		{"drips empty lines", func(c *client) { drip(c, "\r\n", 29) }, firstByteTimeout - 29*time.Second, 0},
		{"drips them by the byte", func(c *client) {
			for range 14 {
				drip(c, "\r", 1)
				drip(c, "\n", 1)
			}
		}, firstByteTimeout - 28*time.Second, 0},
		{"drips them behind a request", func(c *client) { c.send(request); c.read(false); drip(c, "\r\n", 74) }, idleTimeout - 74*time.Second, 0},
		{"half a head", func(c *client) { c.send("GET /echo HT") }, headTimeout, 408},
		{"head that drips", func(c *client) {
			for i := range 9 {
				drip(c, request[i:i+1], 1)
			}
		}, headTimeout - 9*time.Second, 408},
		{"CR alone, later a head that drips", func(c *client) {
			c.send("\r")
			time.Sleep(5 * time.Second)
			c.send("\n")
			time.Sleep(time.Second)
			c.send("GET")
		}, headTimeout, 408},
		{"idle behind a request", func(c *client) { c.send(request); c.read(false) }, idleTimeout, 0},
		{"half a head behind a request", func(c *client) { c.send(request); c.read(false); c.send("G") }, headTimeout, 408},
		{"body that stops", func(c *client) { c.send("POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe") }, bodyTimeout, 408},
		{"chunks that stop", func(c *client) {
			c.send("POST /register HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe")
		}, bodyTimeout, 408},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reg := registry.New(registry.Config{})
				p, err := New(Config{Registry: reg, API: registry.NewHandler(reg, nil)}, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				near, far := net.Pipe()
				defer near.Close()
				p.accepted(far)
				c := &client{t: t, Conn: near, r: bufio.NewReader(near)}
				row.script(c)
				began := time.Now()
				if row.status != 0 {
					if m := c.read(false); m.status() != row.status {
						t.Errorf("status %d, want %d", m.status(), row.status)
					}
				}
				c.closed()
				if took := time.Since(began); took < row.after || took > row.after+time.Second {
					t.Errorf("after %v, want %v and at most a second more", took, row.after)
				}
			})
		})
	}
}
