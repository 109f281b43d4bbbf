// Package admin is the listener for those who operate the gateway: whether it lives, whether it is ready, how it does, and the
// API. It does not know who may use what: the handlers that it is given decide that.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// Config is what an admin listener serves.
type Config struct {
	Ready    func() bool             // whether /readyz says so
	Metrics  fasthttp.RequestHandler // /metrics; nil: not served
	Profiles fasthttp.RequestHandler // /debug/pprof/, with its own rule of access; nil: not served
	Reload   fasthttp.RequestHandler // POST /reload, with its own rule of access; nil: not served
	Explain  fasthttp.RequestHandler // /explain, likewise
	API      fasthttp.RequestHandler // /register and /services, likewise
	Log      *slog.Logger
}

// Server answers /healthz, /readyz and /metrics to whoever reaches it, under any Host, and passes the other paths on.
type Server struct {
	cfg  Config
	http *fasthttp.Server
}

// New makes a server of cfg, all of which is needed but the handlers.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg}
	s.http = &fasthttp.Server{
		Handler:                      s.recovering,
		ErrorHandler:                 registry.ErrorHandler,
		MaxRequestBodySize:           registry.MaxBody,
		ReadBufferSize:               16 << 10, // the longest request head
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  75 * time.Second,
		DisablePreParseMultipartForm: true,
		NoDefaultServerHeader:        true,
		CloseOnShutdown:              true,
		SecureErrorLogMessage:        true,
		Logger:                       logger{cfg.Log},
	}
	return s
}

// Serve answers on ln until Shutdown; then its error is nil.
func (s *Server) Serve(ln net.Listener) error {
	return s.http.Serve(patient{ln})
}

// Shutdown closes the listener and idle connections and waits for requests in flight, as long as ctx lets it.
func (s *Server) Shutdown(ctx context.Context) error {
	return s.http.ShutdownWithContext(ctx)
}

// recovering makes a panic cost one request, not the process: fasthttp has no guard of its own.
func (s *Server) recovering(ctx *fasthttp.RequestCtx) {
	defer func() {
		if r := recover(); r != nil {
			s.cfg.Log.Error("panic in the admin listener", "panic", r, "stack", string(debug.Stack()))
			registry.Problem(ctx, fasthttp.StatusInternalServerError, "", "this request met a defect of the gateway; its log says more")
		}
	}()
	// Requests on the other listener go first: a storm of calls is done in pieces.
	runtime.Gosched()
	s.handle(ctx)
	runtime.Gosched()
}

func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	switch path := path(ctx); {
	case path == "/healthz":
		s.answer(ctx, true)
	case path == "/readyz":
		s.answer(ctx, s.cfg.Ready())
	case path == "/metrics" && s.cfg.Metrics != nil:
		if reads(ctx) {
			s.cfg.Metrics(ctx)
		}
	case strings.HasPrefix(path, "/debug/pprof/") && s.cfg.Profiles != nil:
		s.cfg.Profiles(ctx)
	case path == "/reload" && s.cfg.Reload != nil:
		if !ctx.IsPost() {
			ctx.Response.Header.Set(fasthttp.HeaderAllow, "POST")
			registry.Problem(ctx, fasthttp.StatusMethodNotAllowed, "", "this path answers POST")
			return
		}
		s.cfg.Reload(ctx)
	case path == "/explain" && s.cfg.Explain != nil:
		if reads(ctx) {
			s.cfg.Explain(ctx)
		}
	case s.cfg.API != nil && registry.Serves(path):
		s.cfg.API(ctx)
		if stream := registry.Stream(ctx); stream != nil {
			ctx.HijackSetNoResponse(true)
			ctx.Hijack(func(conn net.Conn) {
				defer func() {
					if r := recover(); r != nil {
						s.cfg.Log.Error("panic in the admin listener", "panic", r, "stack", string(debug.Stack()))
					}
				}()
				stream(conn)
			})
		}
	default:
		registry.Problem(ctx, fasthttp.StatusNotFound, "", "nothing is served at this path; there are "+s.paths())
	}
}

// answer tells ok, or not ready with 503, to GET and HEAD.
func (s *Server) answer(ctx *fasthttp.RequestCtx, ok bool) {
	if !reads(ctx) {
		return
	}
	ctx.Response.Header.Set(fasthttp.HeaderCacheControl, "no-store")
	if !ok {
		ctx.SetStatusCode(fasthttp.StatusServiceUnavailable)
		ctx.SetBodyString("not ready\n")
		return
	}
	ctx.SetBodyString("ok\n")
}

// reads refuses all methods but GET and HEAD.
func reads(ctx *fasthttp.RequestCtx) bool {
	if ctx.IsGet() || ctx.IsHead() {
		return true
	}
	ctx.Response.Header.Set(fasthttp.HeaderAllow, "GET, HEAD")
	registry.Problem(ctx, fasthttp.StatusMethodNotAllowed, "", "this path answers GET and HEAD")
	return false
}

// paths are what is served here.
func (s *Server) paths() string {
	paths := []string{"/healthz", "/readyz"}
	if s.cfg.Metrics != nil {
		paths = append(paths, "/metrics")
	}
	if s.cfg.Profiles != nil {
		paths = append(paths, "/debug/pprof/")
	}
	if s.cfg.Reload != nil {
		paths = append(paths, "/reload")
	}
	if s.cfg.Explain != nil {
		paths = append(paths, "/explain")
	}
	if s.cfg.API != nil {
		paths = append(paths, "/register", "/services")
	}
	last := len(paths) - 1
	return strings.Join(paths[:last], ", ") + " and " + paths[last]
}

// path is the raw path of the request, so that no decoding or clean-up makes it one that is served. Of the absolute form
// (RFC 9112 3.2.2) it is the part after the authority.
func path(ctx *fasthttp.RequestCtx) string {
	target := string(ctx.Request.Header.RequestURI())
	if _, rest, absolute := strings.Cut(target, "://"); absolute && !strings.HasPrefix(target, "/") {
		target = rest[max(0, strings.IndexByte(rest, '/')):]
	}
	path, _, _ := strings.Cut(target, "?")
	return path
}

// patient is a listener that outlasts a want of file descriptors or memory, which ends fasthttp's Serve for good.
type patient struct{ net.Listener }

func (l patient) Accept() (net.Conn, error) {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		conn, err := l.Listener.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) {
			return conn, err
		}
		time.Sleep(pause)
	}
}

// logger takes what fasthttp says of connections that failed: of interest only to who looks for it.
type logger struct{ log *slog.Logger }

func (l logger) Printf(format string, args ...any) {
	l.log.Debug("admin connection", "error", fmt.Sprintf(format, args...))
}
