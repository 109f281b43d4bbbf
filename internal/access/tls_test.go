package access

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kerberos/registry/client"
)

// authority signs certificates for a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key, a.cert, a.pem = a.make(template, template, nil)
	return a
}

func (a *authority) make(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate, []byte) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// sign makes a certificate with these names and its key, as PEM. A name with a colon is a URI, the first of "=x" the common name.
func (a *authority) sign(until time.Time, names ...string) (cert, key []byte) {
	a.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	for _, name := range names {
		if common, ok := strings.CutPrefix(name, "="); ok {
			template.Subject.CommonName = common
		} else if uri, err := url.Parse(name); err == nil && strings.Contains(name, ":") {
			template.URIs = append(template.URIs, uri)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	private, _, cert := a.make(template, a.cert, a.key)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// client is one that trusts the authority of the server, with a certificate if there is one. Each call has its own connection.
func (a *authority) client(cert, key []byte) *http.Client {
	a.t.Helper()
	return &http.Client{Transport: &http.Transport{TLSClientConfig: a.config(cert, key), DisableKeepAlives: true}}
}

func (a *authority) config(cert, key []byte) *tls.Config {
	a.t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	config := &tls.Config{RootCAs: roots}
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			a.t.Fatal(err)
		}
		// Sent whatever authorities the server names.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config
}

// files are those of an admin listener.
func (a *authority) files(dir string) TLSConfig {
	a.t.Helper()
	cert, key := a.sign(time.Now().Add(time.Hour), "gateway")
	cfg := TLSConfig{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), ClientCA: filepath.Join(dir, "ca.pem")}
	file(a.t, cfg.Cert, string(cert))
	file(a.t, cfg.Key, string(key))
	file(a.t, cfg.ClientCA, string(a.pem))
	return cfg
}

// Who may do what with which certificate.
func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	ca, stranger := newAuthority(t), newAuthority(t)
	soon := time.Now().Add(time.Hour)
	path := filepath.Join(dir, "tokens.yaml")
	file(t, path, entries+`
- {name: ci, certificate: ci.example.org, admin: true}
- {name: team, certificate: "spiffe://example.org/team", register: [mine]}
- {name: old, certificate: Old Team, read: true}
`)
	withFile, without := ca.files(dir), ca.files(t.TempDir())
	strict := guard(t, Config{Tokens: path, Certificates: true}, &withFile)
	open := guard(t, Config{Certificates: true}, &without)
	for _, row := range []struct {
		name         string
		by           *authority
		until        time.Time
		names        []string
		token        string
		fails        string // in the log, where there is no handshake
		list, mine   int    // GET /services, and of mine
		change       int    // PUT of mine
		says         string
		withoutTable int // GET /services where there is no file
	}{
		{"none", nil, soon, nil, "", "", 401, 401, 401, "client certificate", 401},
		{"none, but a token", nil, soon, nil, "mine", "", 200, 404, 204, "", 401},
		{"a DNS name", ca, soon, []string{"other", "ci.example.org"}, "", "", 200, 404, 204, "", 200},
		{"a URI", ca, soon, []string{"spiffe://example.org/team"}, "", "", 200, 404, 204, "", 200},
		{"a common name", ca, soon, []string{"=Old Team"}, "", "", 200, 404, 403, "certificate old has no right", 200},
		{"a common name beside others", ca, soon, []string{"=ci.example.org", "other"}, "", "", 403, 403, 403, "no entry of the tokens file is for the certificate of other", 200},
		{"not listed", ca, soon, []string{"evil"}, "", "", 403, 403, 403, "certificate of evil", 200},
		{"the name of an entry", ca, soon, []string{"ci"}, "", "", 403, 403, 403, "certificate of ci", 200},
		{"without a name", ca, soon, nil, "", "", 403, 403, 403, "no entry", 200},
		{"and a token that is wrong", ca, soon, []string{"ci.example.org"}, "nobody", "", 401, 401, 401, "not the gateway's", 401},
		{"and a token of less", ca, soon, []string{"ci.example.org"}, "read", "", 200, 404, 403, "token read has no right", 401},
		{"of another authority", stranger, soon, []string{"ci.example.org"}, "", "unknown authority", 0, 0, 0, "", 0},
		{"expired", ca, time.Now().Add(-time.Hour), []string{"ci.example.org"}, "", "expired", 0, 0, 0, "", 0},
	} {
		var cert, key []byte
		if row.by != nil {
			cert, key = row.by.sign(row.until, row.names...)
		}
		client := ca.client(cert, key)
		if row.fails != "" {
			for _, path := range []string{"/services", "/healthz"} {
				if response, err := client.Get("https://" + strict.addr + path); err == nil {
					t.Errorf("%s: %s", row.name, response.Status)
				}
			}
			eventually(t, row.name+": it is logged", func() bool {
				return strings.Contains(strict.log.String(), `"msg":"client certificate refused","peer":"127.0.0.1:`) && strings.Contains(strict.log.String(), row.fails)
			})
			continue
		}
		auth := ""
		if row.token != "" {
			auth = token(row.token)
		}
		for _, call := range []struct {
			method, target, body string
			want                 int
		}{{"GET", "/services", "", row.list}, {"GET", "/services/mine", "", row.mine}, {"PUT", "/services/mine/a", `{"addr":"http://127.0.0.1:9"}`, row.change}} {
			status, text, _ := strict.ask(client, auth, call.method, call.target, call.body)
			if status != call.want && !(call.want == 401 && status == 429 || call.want == 403 && status == 429) || status == row.change && status != 204 && !strings.Contains(text, row.says) {
				t.Errorf("%s: %s %s: %d %s; want %d, %q", row.name, call.method, call.target, status, text, call.want, row.says)
			}
		}
		_ = strict.reg.Unregister("mine", "a", "")
		if status, text, _ := open.ask(client, auth, "GET", "/services", ""); status != row.withoutTable {
			t.Errorf("%s, without a file: %d %s", row.name, status, text)
		}
		for _, path := range []string{"/healthz", "/readyz"} {
			if status, _, _ := strict.ask(client, "", "GET", path, ""); status != 200 {
				t.Errorf("%s: %s answers %d", row.name, path, status)
			}
		}
	}
	for _, by := range []string{`"by":"certificate ci"`, `"by":"certificate team"`, `"by":"token mine"`} {
		if !strings.Contains(strict.log.String(), `"registration changed","action":"register","instance":"mine/a",`+by) {
			t.Errorf("%s is not in\n%s", by, strict.log.String())
		}
	}
}

// A page of another site cannot use the certificate of a browser, however it has the request made.
func TestCertificateOfABrowser(t *testing.T) {
	ca := newAuthority(t)
	files := ca.files(t.TempDir())
	g := guard(t, Config{Certificates: true}, &files)
	cert, key := ca.sign(time.Now().Add(time.Hour), "a")
	for site, want := range map[string]int{"": 200, "none": 200, "same-origin": 200, "same-site": 403, "cross-site": 403} {
		request, err := http.NewRequest("GET", "https://"+g.addr+"/services", nil)
		if err != nil {
			t.Fatal(err)
		}
		if site != "" {
			request.Header.Set("Sec-Fetch-Site", site)
		}
		response, err := ca.client(cert, key).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%q: %d", site, response.StatusCode)
		}
	}
}

// An old version of TLS, and no TLS, is not answered.
func TestVersions(t *testing.T) {
	ca := newAuthority(t)
	files := ca.files(t.TempDir())
	files.ClientCA = ""
	g := guard(t, Config{Token: token("flag")}, &files)
	for version, want := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		config := ca.config(nil, nil)
		config.MinVersion, config.MaxVersion = version, version
		conn, err := tls.Dial("tcp", g.addr, config)
		if err == nil {
			conn.Close()
		}
		if (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
	if response, err := http.Get("http://" + g.addr + "/healthz"); err == nil {
		t.Errorf("without TLS: %s", response.Status)
	}
	if status, _, _ := g.ask(ca.client(nil, nil), token("flag"), "GET", "/services", ""); status != 200 {
		t.Errorf("a token over TLS: %d", status)
	}
}

// New connections get what the files hold by now, and what cannot be used is not taken.
func TestCertificatesAreFollowed(t *testing.T) {
	ca, next := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	files := ca.files(dir)
	g := guard(t, Config{Certificates: true}, &files)
	cert, key := ca.sign(time.Now().Add(time.Hour), "a")
	if status, _, _ := g.ask(ca.client(cert, key), "", "GET", "/services", ""); status != 200 {
		t.Fatal(status)
	}
	_, other := ca.sign(time.Now().Add(time.Hour), "x")
	file(t, files.Key, string(other))
	eventually(t, "the wrong key is refused", func() bool { return strings.Contains(g.log.String(), "cannot be used") })
	if status, _, _ := g.ask(ca.client(cert, key), "", "GET", "/services", ""); status != 200 {
		t.Fatal(status)
	}
	next.files(dir)
	nextCert, nextKey := next.sign(time.Now().Add(time.Hour), "a")
	eventually(t, "the next certificate is there", func() bool {
		response, err := next.client(nextCert, nextKey).Get("https://" + g.addr + "/services")
		return err == nil && response.StatusCode == 200
	})
	if _, err := next.client(cert, key).Get("https://" + g.addr + "/services"); err == nil {
		t.Error("who the authority of before has signed is let in")
	}
}

func TestNewTLSRefuses(t *testing.T) {
	ca := newAuthority(t)
	good := ca.files(t.TempDir())
	other := ca.files(t.TempDir())
	for want, cfg := range map[string]TLSConfig{
		"--admin-cert: stat /none":              {Cert: "/none", Key: good.Key},
		"--admin-key: stat /none":               {Cert: good.Cert, Key: "/none"},
		"--admin-client-ca: stat /none":         {Cert: good.Cert, Key: good.Key, ClientCA: "/none"},
		"private key does not match":            {Cert: good.Cert, Key: other.Key},
		"failed to find any PEM data":           {Cert: "tls_test.go", Key: good.Key},
		"tls_test.go holds no certificate":      {Cert: good.Cert, Key: good.Key, ClientCA: "tls_test.go"},
		"--admin-client-ca: . is no regular fi": {Cert: good.Cert, Key: good.Key, ClientCA: "."},
	} {
		if _, err := NewTLS(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	if err := os.Chmod(good.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	log := &transcript{}
	good.Log = slog.New(slog.NewTextHandler(log, nil))
	s, err := NewTLS(good)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if !strings.Contains(log.String(), "may read the private key") {
		t.Error(log.String())
	}
}

// A connection that speaks TLS can hold a lease.
func TestHoldOverTLS(t *testing.T) {
	ca := newAuthority(t)
	files := ca.files(t.TempDir())
	g := guard(t, Config{Certificates: true}, &files)
	cert, key := ca.sign(time.Now().Add(time.Hour), "a")
	conn, r := g.hold("", func() (net.Conn, error) { return tls.Dial("tcp", g.addr, ca.config(cert, key)) })
	for range 2 {
		if line, err := r.ReadString('\n'); err != nil || line != "{\"heartbeat\":true}\n" {
			t.Errorf("%q, %v", line, err)
		}
	}
	_ = conn.(*tls.Conn).NetConn().Close() // without a word
	eventually(t, "it is on a lease", func() bool {
		_, lent := g.reg.ExpiresIn(g.reg.Snapshot("mine").Instance("held"))
		return lent
	})
	_, r = g.hold("", func() (net.Conn, error) { return tls.Dial("tcp", g.addr, ca.config(cert, key)) })
	_ = g.reg.Unregister("mine", "held", "")
	if rest, err := io.ReadAll(r); err != nil || !strings.Contains(string(rest), "it was unregistered") { // and the end of it is said, too
		t.Errorf("%q, %v", rest, err)
	}
}

// A connection to which nobody speaks is closed, and does not keep others waiting.
func TestSilentHandshake(t *testing.T) {
	ca := newAuthority(t)
	files := ca.files(t.TempDir())
	g := guard(t, Config{Certificates: true}, &files)
	for range 10 {
		conn, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if status, _, _ := g.ask(ca.client(nil, nil), "", "GET", "/healthz", ""); status != 200 {
		t.Error(status)
	}
}

// The package that keeps programs registered needs an http.Client that speaks TLS, and no more.
func TestClientOverTLS(t *testing.T) {
	ca := newAuthority(t)
	files := ca.files(t.TempDir())
	g := guard(t, Config{Certificates: true}, &files)
	cert, key := ca.sign(time.Now().Add(time.Hour), "a")
	r, err := client.Start(t.Context(), client.Config{Gateways: []string{"https://" + g.addr}, Service: "mine", ID: "a", Addr: "http://127.0.0.1:9", HTTP: ca.client(cert, key)})
	if err != nil {
		t.Fatal(err)
	}
	if names := g.reg.Names(); !slices.Equal(names, []string{"mine"}) {
		t.Error(names)
	}
	if err := r.Close(); err != nil || len(g.reg.Names()) > 0 {
		t.Error(err, g.reg.Names())
	}
}
