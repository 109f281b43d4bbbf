package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
)

// A refusal is an answer of the gateway's own: its status, one line of text for people, and the error type of RFC 9209
// for the Proxy-Status field. The text says what and why, and nothing of the inside.
type refusal struct {
	status int
	kind   string // RFC 9209 section 2.3
	text   string
}

func (r *refusal) Error() string { return r.text }

// What is too much at once; Limits.explain says how much there may be.
var (
	errServiceFull   = &refusal{503, "connection_limit_reached", "the service"}
	errInstancesFull = &refusal{503, "connection_limit_reached", "all instances"}
	errGatewayFull   = &refusal{503, "connection_limit_reached", "the gateway"}
	errClientFull    = &refusal{429, "connection_limit_reached", "your address"}
)

// What clients did wrong. What makes a head or body unclear ends the connection: neither is clear then where the next
// request begins.
var (
	errBareLF             = &refusal{400, "http_request_error", "a line of the request head does not end in CRLF"}
	errRequestLine        = &refusal{400, "http_request_error", "the request line is not METHOD TARGET HTTP/1.1"}
	errVersion            = &refusal{505, "http_request_denied", "only HTTP/1.0 and HTTP/1.1 are spoken here"}
	errTarget             = &refusal{400, "http_request_error", "the request target has bytes that must be percent-encoded, or is none of /path, http://host/path and *"}
	errFieldName          = &refusal{400, "http_request_error", "a field line of the request has no valid name, or is folded"}
	errFieldValue         = &refusal{400, "http_request_error", "a field value of the request has control bytes"}
	errHost               = &refusal{400, "http_request_error", "the request needs one valid Host field"}
	errContentLength      = &refusal{400, "http_request_error", "Content-Length must be one number, sent once"}
	errTransferEncoding   = &refusal{400, "http_request_error", "Transfer-Encoding must be sent once, with HTTP/1.1"}
	errTransferCoding     = &refusal{501, "http_request_denied", "the only transfer coding understood here is chunked"}
	errBothLengths        = &refusal{400, "http_request_error", "a request has Content-Length or Transfer-Encoding, not both"}
	errConnection         = &refusal{400, "http_request_error", "the Connection field names more than 32 fields"}
	errMaxForwards        = &refusal{400, "http_request_error", "Max-Forwards must be a number, sent once"}
	errHeadTooLarge       = &refusal{431, "http_request_error", "the request head is larger than the limit"}
	errFields             = &refusal{431, "http_request_error", "the request has more field lines than the limit"}
	errRequestLineTooLong = &refusal{414, "http_request_error", "the request line is longer than the limit"}
	errHeadTimeout        = &refusal{408, "http_request_error", "the request head did not arrive in time"}
	errBodyTimeout        = &refusal{408, "http_request_error", "the request body stopped arriving"}
	errBodySlow           = &refusal{408, "http_request_error", "the request body arrives too slowly"}
	errBodyTooLarge       = &refusal{413, "http_request_error", "the request body is larger than the limit"}
	errChunk              = &refusal{400, "http_request_error", "the chunked request body is malformed"}
)

// What the gateway does not do, or cannot do now.
var (
	errMethod       = &refusal{405, "http_request_denied", "this method is not allowed here"}
	errMethodTarget = &refusal{400, "http_request_error", "the target of a CONNECT request is not HOST:PORT"}
	errMethodBody   = &refusal{400, "http_request_error", "a CONNECT or TRACE request has no body"}
	errTrace        = &refusal{405, "http_request_denied", "Max-Forwards ends at the gateway, which does not answer TRACE"}
	errPath         = &refusal{400, "http_request_denied", "the path can be read in two ways that lead to different services"}
	errPathBytes    = &refusal{400, "http_request_denied", "the path has a backslash or an encoded NUL"}
	errExpect       = &refusal{417, "http_request_denied", "the only expectation met here is 100-continue"}
	errUpgrade      = &refusal{501, "http_upgrade_failed", "WebSocket is not allowed here"}
	errLoop         = &refusal{508, "proxy_loop_detected", "the request came back to the gateway that sent it"}
	errNoRoute      = &refusal{404, "destination_not_found", "no service is at this path"}
	errNoInstance   = &refusal{503, "destination_unavailable", "no instance of the service is ready"}
	errNoSocket     = &refusal{503, "connection_limit_reached", "the gateway is out of sockets"}
	errOverTime     = &refusal{504, "http_response_timeout", "the request took longer than is allowed here"}
	errInternal     = &refusal{500, "proxy_internal_error", "the gateway failed on this request"}
)

// What backends did wrong.
var (
	errRefused         = &refusal{502, "connection_refused", "the backend refused the connection"}
	errConnectTimeout  = &refusal{504, "connection_timeout", "the backend did not accept the connection in time"}
	errUnreachable     = &refusal{502, "destination_ip_unroutable", "the backend cannot be reached"}
	errProhibited      = &refusal{502, "destination_ip_prohibited", "the backend's address is not allowed"}
	errCertificate     = &refusal{502, "tls_certificate_error", "the backend's certificate is not trusted"}
	errTLS             = &refusal{502, "tls_protocol_error", "the TLS handshake with the backend failed"}
	errTerminated      = &refusal{502, "connection_terminated", "the backend closed the connection before it answered"}
	errResponseTimeout = &refusal{504, "http_response_timeout", "the backend did not answer in time"}
	errWriteTimeout    = &refusal{504, "connection_write_timeout", "the backend stopped taking the request"}
	errMalformed       = &refusal{502, "http_protocol_error", "the backend's response is malformed"}
	errResponseHead    = &refusal{502, "http_response_header_section_size", "the backend's response head is larger than the limit"}
	errResponseFields  = &refusal{502, "http_response_header_section_size", "the backend's response has more field lines than the limit"}
	errIncomplete      = &refusal{502, "http_response_incomplete", "the backend broke off its response"}
	errSwitch          = &refusal{502, "http_upgrade_failed", "the backend switched to a protocol that was not asked for"}
)

// errBadStatus answers for a probe that got a failing status when nobody else could answer.
var errBadStatus = &refusal{502, "destination_unavailable", "the only instance that was asked answered with a failure"}

// errClientGone ends a request whose client left or broke off its body: there is nobody to answer.
var errClientGone = errors.New("the client left")

// errClientSlow ends a response that its client takes too slowly, or not at all.
var errClientSlow = errors.New("the client does not take the response")

// errContinue says that the backend wants the body that it was asked about.
var errContinue = errors.New("100 continue")

// errStale is a kept-alive connection that the backend had closed before it saw the request: nobody's fault.
var errStale = errors.New("the backend had closed the kept-alive connection")

// dialFailure finds the refusal for an error of a dial or handshake. What a handshake did not like is added for the
// operator; clients get the refusal alone.
func dialFailure(err error) error {
	var own *refusal
	var handshake *handshakeError
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.As(err, &own):
		return own
	case ownLimit(err):
		return errNoSocket
	case errors.As(err, &certificate):
		return fmt.Errorf("%w: %w", errCertificate, certificate.Err)
	case isTimeout(err):
		return errConnectTimeout
	case errors.As(err, &handshake):
		return fmt.Errorf("%w: %w", errTLS, handshake.cause)
	case errors.Is(err, syscall.ECONNREFUSED):
		return errRefused
	}
	return errUnreachable
}

// ownLimit reports whether the system has no descriptor, memory or port for another connection of ours.
func ownLimit(err error) bool {
	for _, limit := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, limit) {
			return true
		}
	}
	return false
}

func isTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// outcome is what an attempt says of an instance.
type outcome uint8

const (
	success outcome = iota
	failure
	ignored // nothing: the client's fault or ours
)

// blame says whose fault an error of an attempt is: the instance's, or nobody's that a breaker should hear of.
func blame(err error) outcome {
	for _, other := range []error{errClientGone, errClientSlow, errBodyTimeout, errBodySlow, errBodyTooLarge, errChunk, errOverTime,
		errStale, errNoSocket, errInternal} {
		if errors.Is(err, other) {
			return ignored
		}
	}
	return failure
}

// isOwn reports whether an error is one of ours, not one of a connection.
func isOwn(err error) bool {
	var r *refusal
	return errors.Is(err, errClientGone) || errors.Is(err, errClientSlow) || errors.As(err, &r)
}

// statusError is a response status that counts as a failure of the instance.
type statusError int

func (e statusError) Error() string { return "status " + strconv.Itoa(int(e)) }
