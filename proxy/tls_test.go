package proxy

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// authority signs certificates for the tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// issue makes a certificate for names or addresses that is valid until then.
func (a *authority) issue(t testing.TB, until time.Time, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// secureOrigin is an origin that speaks TLS.
type secureOrigin struct {
	*actor
	resumed atomic.Int64 // handshakes that took a session up again
	bytes   atomic.Int64 // that came in after handshakes
	name    atomic.Pointer[string]
	proto   atomic.Pointer[string]
}

func startSecure(t testing.TB, cfg *tls.Config, first act) *secureOrigin {
	t.Helper()
	s := &secureOrigin{actor: &actor{}}
	s.does(first)
	s.origin = startOrigin(t, func(o *origin, c net.Conn, _ *bufio.Reader) {
		conn := tls.Server(c, cfg)
		defer conn.Close()
		if conn.Handshake() != nil {
			return
		}
		state := conn.ConnectionState()
		s.name.Store(&state.ServerName)
		s.proto.Store(&state.NegotiatedProtocol)
		if state.DidResume {
			s.resumed.Add(1)
		}
		s.serve(o, conn, bufio.NewReader(countingReader{conn, &s.bytes}))
	})
	return s
}

type countingReader struct {
	io.Reader
	n *atomic.Int64
}

func (r countingReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	r.n.Add(int64(n))
	return n, err
}

func (s *secureOrigin) at(host string) string { return fmt.Sprintf("https://%s:%d", host, s.port()) }

func withAuthority(a *authority) func(*Config) {
	return func(cfg *Config) {
		cfg.UpstreamCA, cfg.UpstreamIdle, cfg.Breaker.Failures = a.pool(), time.Minute, 100
	}
}

func TestHTTPSUpstreams(t *testing.T) {
	ca := newAuthority(t)
	valid := time.Now().Add(time.Hour)
	names.set("secure.test", "127.0.0.1")
	for _, host := range []string{"localhost", "127.0.0.1", "secure.test"} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(host+" "+tls.VersionName(version), func(t *testing.T) {
				g := startGateway(t, withAuthority(ca), nil)
				s := startSecure(t, &tls.Config{
					Certificates: []tls.Certificate{ca.issue(t, valid, host)}, MinVersion: version, MaxVersion: version,
					NextProtos: []string{"h2", "http/1.1"},
				}, says("secret"))
				g.register(t, "echo", "a", s.at(host))
				g.awaitReady(t, 1)
				c := g.dial(t)
				for i := range 20 { // session tickets of TLS 1.3 are no bytes nobody asked for
					if m := c.post("/echo", strings.Repeat("x", i*1000)).want(t, 200); m.body != "secret" {
						t.Errorf("got %q", m.body)
					}
				}
				if n := s.accepted.Load(); n != 1 {
					t.Errorf("%d connections for 20 requests in turn", n)
				}
				if name := *s.name.Load(); host != "127.0.0.1" && name != host || host == "127.0.0.1" && name != "" {
					t.Errorf("the server name sent is %q", name)
				}
				if proto := *s.proto.Load(); proto != "http/1.1" {
					t.Errorf("negotiated %q", proto)
				}

				// A new connection takes the session up again.
				s.does(breaksOff("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"))
				for range 3 {
					c.picks(1)
				}
				if s.resumed.Load() == 0 {
					t.Error("no session was used again")
				}
				if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
					t.Errorf("counted %+v", s)
				}
			})
		}
	}
}

// A failed handshake is a connect failure: nothing of the request is sent, so a POST goes on to another instance.
func TestFailedHandshakes(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	valid := time.Now().Add(time.Hour)
	good := ca.issue(t, valid, "localhost")
	tests := []struct {
		name string
		cfg  *tls.Config
		want *refusal
		last string // of its last error
	}{
		{"wrong name", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, valid, "other.example", "127.0.0.1")}}, errCertificate, "not localhost"},
		{"expired", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(-time.Minute), "localhost")}}, errCertificate, "expired"},
		{"unknown authority", &tls.Config{Certificates: []tls.Certificate{stranger.issue(t, valid, "localhost")}}, errCertificate, "unknown authority"},
		{"TLS 1.1", &tls.Config{Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, errTLS, "protocol version"},
		{"wants our certificate", &tls.Config{Certificates: []tls.Certificate{good}, ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12}, errTLS, "tls: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, withAuthority(ca), nil)
			s := startSecure(t, tt.cfg, says("never"))
			g.register(t, "echo", "a", s.at("localhost"))
			c := g.dial(t)
			for _, method := range []string{"GET", "POST"} {
				c.send(method + " /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nsecret")
				if m := c.read(false).refused(t, tt.want); !strings.HasSuffix(m.body, ": "+tt.want.text+"\n") {
					t.Errorf("the client is told %q", m.body)
				}
			}
			s.stop() // has seen all that was sent
			if n := s.bytes.Load(); n != 0 {
				t.Errorf("%d bytes of the request reached the backend", n)
			}
			if s := g.DescribeInstance("echo", "a"); s.Failure != 2 || !strings.HasPrefix(s.LastError, tt.want.text) || !strings.Contains(s.LastError, tt.last) {
				t.Errorf("described as %+v, want the last error to say %q", s, tt.last)
			}
			g.register(t, "echo", "b", startActor(t, says("b")).url())
			for range 4 {
				if m := c.post("/echo", "x").want(t, 200); m.body != "b" {
					t.Errorf("got %q", m.body)
				}
			}
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		g := startGateway(t, withAuthority(ca), nil)
		a := startActor(t, says("plain"))
		plain := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
			io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			io.Copy(io.Discard, r)
		})
		a.origin = plain
		g.register(t, "echo", "a", fmt.Sprintf("https://localhost:%d", plain.port()))
		g.dial(t).get("/echo").refused(t, errTLS)
	})
	t.Run("hangs", func(t *testing.T) {
		g := startGateway(t, func(cfg *Config) { withAuthority(ca)(cfg); cfg.ConnectTimeout = 50 * time.Millisecond }, nil)
		o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
		g.register(t, "echo", "a", fmt.Sprintf("https://localhost:%d", o.port()))
		g.dial(t).post("/echo", "x").refused(t, errConnectTimeout)
	})
	t.Run("closes", func(t *testing.T) {
		g := startGateway(t, withAuthority(ca), nil)
		o := startOrigin(t, func(*origin, net.Conn, *bufio.Reader) {})
		g.register(t, "echo", "a", fmt.Sprintf("https://localhost:%d", o.port()))
		m := g.dial(t).post("/echo", "x").want(t, 502)
		if kind := m.field("Proxy-Status"); !strings.Contains(kind, errTLS.kind) && !strings.Contains(kind, errTerminated.kind) {
			t.Errorf("answered %q", m.head)
		}
	})
}

// Unverified only if asked for; without a pool of ours the system's roots count, which do not know ours.
func TestUpstreamVerification(t *testing.T) {
	ca := newAuthority(t)
	s := startSecure(t, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(-time.Minute), "other.example")}}, says("secret"))
	insecure := startGateway(t, func(cfg *Config) { cfg.UpstreamInsecure = true }, nil)
	insecure.register(t, "echo", "a", s.at("localhost"))
	insecure.dial(t).picks(1)
	strict := startGateway(t, nil, nil)
	strict.register(t, "echo", "a", s.at("localhost"))
	before := s.bytes.Load()
	strict.dial(t).get("/echo").refused(t, errCertificate)
	if s.bytes.Load() != before {
		t.Error("bytes of the request reached a backend that was not verified")
	}
}

// Bytes that a TLS backend sends unasked are never taken for the answer to the next request.
func TestLateBytesOverTLS(t *testing.T) {
	ca := newAuthority(t)
	g := startGateway(t, withAuthority(ca), nil)
	s := startSecure(t, &tls.Config{
		Certificates:                []tls.Certificate{ca.issue(t, time.Now().Add(time.Hour), "localhost")},
		DynamicRecordSizingDisabled: true, // one record for each write
	}, nil)
	late := make(chan struct{}, 1)
	s.does(func(c net.Conn, m *message) bool {
		says("ok")(c, m)
		time.Sleep(time.Millisecond)
		writes("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")(c, m)
		late <- struct{}{}
		return true
	})
	g.register(t, "echo", "a", s.at("localhost"))
	c := g.dial(t)
	for range 5 {
		if got := c.picks(1); got != "ok" {
			t.Fatalf("the answer to another request: %q", got)
		}
		<-late
	}
	// Also not where TLS has read them along with the response already, and holds them where the socket cannot tell.
	body := strings.Repeat("x", 6000)
	s.does(writes(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%sHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", len(body), body)))
	for range 5 {
		if got := c.picks(1); got != body {
			t.Fatalf("the answer to another request: %q", got)
		}
	}

	// And one that was closed meanwhile is not used.
	s.does(func(c net.Conn, m *message) bool {
		says("ok")(c, m)
		return false
	})
	for range 5 {
		if m := c.post("/echo", "x").want(t, 200); m.body != "ok" {
			t.Errorf("got %q", m.body)
		}
		eventually(t, "closed by the backend", func() bool { return s.open() == 0 })
	}
}

// A request that comes back is answered 508, through however many hops that keep Via.
func TestLoops(t *testing.T) {
	loop := func(t *testing.T, change func(*Config)) *gateway {
		first, second := startGateway(t, change, nil), startGateway(t, change, nil)
		first.register(t, "echo", "next", "http://"+second.addr)
		second.register(t, "echo", "back", "http://"+first.addr)
		return first
	}
	g := loop(t, func(cfg *Config) { cfg.Retries = -1 })
	if m := g.dial(t).get("/echo"); m.status() != 508 || !strings.Contains(m.field("Proxy-Status"), errLoop.kind) {
		t.Errorf("got %q %q", m.head, m.body)
	}
	itself := startGateway(t, nil, nil)
	itself.register(t, "echo", "me", "http://"+itself.addr)
	itself.dial(t).get("/echo").refused(t, errLoop)

	// Another gateway's Via is none of our business.
	plain := startGateway(t, nil, nil)
	plain.register(t, "echo", "a", naming(t, "a").url())
	if m := plain.dial(t).get("/echo", "Via: 1.1 "+string(g.pseudonym), "Via: 1.1 kerberos").want(t, 200); m.body != "a" {
		t.Errorf("got %q", m.body)
	}
	if string(g.pseudonym) == string(plain.pseudonym) {
		t.Error("two gateways have one name")
	}
}

// The registry refuses the own listener; by another of the machine's addresses it would be a loop.
func TestLoopThroughAnotherAddress(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }, nil)
	names.set("alias.test", "127.0.0.1")
	_, port, _ := net.SplitHostPort(g.addr)
	g.register(t, "echo", "me", "http://alias.test:"+port)
	g.awaitReady(t, 1)
	g.dial(t).get("/echo", "X-Forwarded-For: 192.0.2.1").refused(t, errLoop)
}
