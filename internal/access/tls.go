package access

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"

	"kerberos/internal/follow"
)

// TLS is the transport security of the admin listener. It follows its files when they change; connections that are open keep what
// they began with.
type TLS struct {
	cfg      TLSConfig
	config   atomic.Pointer[tls.Config]
	follower *follow.Follower
	notes    notes
}

// TLSConfig is where the certificates are, in PEM form.
type TLSConfig struct {
	Cert, Key string // of the server, with those between it and its authority behind it
	ClientCA  string // of the authorities that sign clients' certificates; empty: clients are not asked for one

	Log *slog.Logger // certificates that were refused, and what becomes of the files
}

// NewTLS reads the files. Close ends what follows them.
func NewTLS(cfg TLSConfig) (*TLS, error) {
	t := &TLS{cfg: cfg, notes: notes{log: cfg.Log}}
	files := []string{cfg.Cert, cfg.Key}
	if cfg.ClientCA != "" {
		files = append(files, cfg.ClientCA)
	}
	seen := follow.Fingerprint(files...)
	if err := t.read(); err != nil {
		return nil, err
	}
	t.follower = follow.Files(seen, t.reread, files...)
	return t, nil
}

// Check refuses files that NewTLS refuses. It starts nothing.
func (cfg TLSConfig) Check() error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return (&TLS{cfg: cfg}).read()
}

// Close ends what follows the files. Listeners stay.
func (t *TLS) Close() { t.follower.Close() }

// read makes the files what new connections get. On an error nothing changes.
func (t *TLS) read() error {
	cert, err := follow.Read(t.cfg.Cert)
	if err != nil {
		return fmt.Errorf("--admin-cert: %w", err)
	}
	key, err := follow.Read(t.cfg.Key)
	if err != nil {
		return fmt.Errorf("--admin-key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("--admin-cert %s and --admin-key %s: %w", t.cfg.Cert, t.cfg.Key, err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"http/1.1"},
		// A session that is resumed would not have its client's certificate looked at again, by other authorities perhaps.
		SessionTicketsDisabled: true,
	}
	if t.cfg.ClientCA != "" {
		ca, err := follow.Read(t.cfg.ClientCA)
		if err != nil {
			return fmt.Errorf("--admin-client-ca: %w", err)
		}
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(ca) {
			return fmt.Errorf("--admin-client-ca: %s holds no certificate in PEM form", t.cfg.ClientCA)
		}
		config.ClientAuth = tls.VerifyClientCertIfGiven // /healthz needs none; Rule asks for it
	}
	t.config.Store(config)
	if info, err := os.Stat(t.cfg.Key); err == nil && info.Mode().Perm()&0o077 != 0 {
		t.cfg.Log.Warn("others may read the private key of the admin listener: chmod 600", "file", t.cfg.Key, "mode", info.Mode().Perm().String())
	}
	return nil
}

func (t *TLS) reread() {
	if err := t.read(); err != nil {
		t.cfg.Log.Error("the certificates of the admin listener have changed and cannot be used: what they were before stays in force", "reason", err.Error())
		return
	}
	t.cfg.Log.Info("the certificates of the admin listener have been read again", "file", t.cfg.Cert)
}

// Listener has the connections of ln speak TLS.
func (t *TLS) Listener(ln net.Listener) net.Listener {
	return &tlsListener{ln, t, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return t.config.Load(), nil }}}
}

type tlsListener struct {
	net.Listener
	tls    *TLS
	config *tls.Config
}

func (l *tlsListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &tlsConn{tls.Server(conn, l.config), l.tls}, nil
}

// tlsConn notes a client's certificate that was refused. Its handshake is a part of the first Read.
type tlsConn struct {
	*tls.Conn
	tls *TLS
}

func (c *tlsConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	var refused *tls.CertificateVerificationError
	if errors.As(err, &refused) {
		c.tls.notes.write("client certificate refused", slog.String("peer", c.RemoteAddr().String()), slog.String("reason", refused.Err.Error()))
	}
	return n, err
}

// namesOf are the names that a certificate is for: the DNS names and URIs of its subjectAltName, or the common name if it has
// none of them. An authority that checks names checks those; a common name beside them may be anything.
func namesOf(cert *x509.Certificate) []string {
	var names []string
	names = append(names, cert.DNSNames...)
	for _, uri := range cert.URIs {
		names = append(names, uri.String())
	}
	if len(names) == 0 {
		names = append(names, cert.Subject.CommonName)
	}
	return names
}
