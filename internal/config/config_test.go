package config

import (
	"crypto/x509"
	"encoding/pem"
	"maps"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"kerberos/lb"
)

// parse reads a command line with nothing in the environment but env.
func parse(t *testing.T, args []string, env map[string]string) (Gateway, error) {
	t.Helper()
	var grammar struct {
		Run   Gateway `cmd:"" default:"withargs"`
		Other struct {
			Listen string `default:":8081" type:"listen" noenv:""`
			Token  string `type:"token"`
		} `cmd:""`
	}
	_, err := Parse(&grammar, args, func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	return grammar.Run, err
}

func prefixes(s ...string) []netip.Prefix {
	all := make([]netip.Prefix, len(s))
	for i := range s {
		all[i] = netip.MustParsePrefix(s[i])
	}
	return all
}

func TestValues(t *testing.T) {
	defaults := Gateway{
		Listen: ":8080", Admin: "127.0.0.1:9901", DrainTimeout: 30 * time.Second, API: APIBoth,
		Strategy: lb.RoundRobin, RequestTimeout: 30 * time.Second, ConnectTimeout: 2 * time.Second, Retries: 2,
		BreakerFailures: 5, BreakerOpen: 30 * time.Second, BreakerProbes: 3, BreakerStatuses: []int{502, 503, 504}, Via: true, Metrics: true,
		ClientFirstByteTimeout: 30 * time.Second, ClientHeadTimeout: 10 * time.Second, ClientIdleTimeout: 75 * time.Second,
		ClientBodyTimeout: 30 * time.Second, ClientWriteTimeout: time.Minute, AbortOnFin: true,
		ResponseIdleTimeout: 5 * time.Minute, UpstreamIdleTimeout: 4 * time.Second,
		MaxConnections: Share{Percent: 90}, QueueTimeout: time.Second, MetricsMaxSeries: 100_000,
		AmbiguousPaths: "refuse", MaxHead: 32 << 10, MaxFields: 200, MaxRequestLine: 16 << 10,
		AllowUpgrades: []string{"websocket"}, TunnelIdleTimeout: time.Hour,
		AccessLog: "off", AccessLogFormat: "json", AccessLogSample: 1, OTLPProtocol: "http", TraceSample: 0.01,
	}
	tests := []struct {
		name string
		args string
		env  map[string]string
		want func(g *Gateway)
	}{
		{"nothing", "", nil, func(*Gateway) {}},
		{"run by its name", "run --listen :0", nil, func(g *Gateway) { g.Listen = ":0" }},
		{"a directory that is there", "--data .", nil, func(g *Gateway) { g.Data = "." }},
		{"a directory that is not there", "", map[string]string{"KERBEROS_DATA": "a/b"}, func(g *Gateway) { g.Data = "a/b" }},
		{"listeners", "--listen [::1]:80 --admin off --health-path /up", nil, func(g *Gateway) {
			g.Listen, g.Admin, g.HealthPath = "[::1]:80", "off", "/up"
		}},
		{"switches", "--no-via --request-id --no-metrics", nil, func(g *Gateway) { g.Via, g.RequestID, g.Metrics = false, true, false }},
		{"switches with words", "--via=off --request-id=on --upstream-insecure=yes", nil, func(g *Gateway) {
			g.Via, g.RequestID, g.UpstreamInsecure = false, true, true
		}},
		{"the last one counts", "--no-via --via", nil, func(*Gateway) {}},
		{"networks", "--trusted-proxies 10.1.2.3/8,::1 --trusted-proxies ::ffff:192.0.2.1", nil, func(g *Gateway) {
			g.TrustedProxies = prefixes("10.0.0.0/8", "::1/128", "192.0.2.1/32")
		}},
		{"mapped network", "--addr-allow ::ffff:10.0.0.0/104 --addr-deny fd00::/8", nil, func(g *Gateway) {
			g.AddrAllow, g.AddrDeny = prefixes("10.0.0.0/8"), prefixes("fd00::/8")
		}},
		{"api access, the default said", "--api-allow loopback", nil, func(g *Gateway) {
			g.APIAllow = Allow{Networks: prefixes("127.0.0.0/8", "::1/128"), Set: true}
		}},
		{"api access, more", "--api-allow loopback,10.0.0.0/8 --api-allow 192.0.2.1", nil, func(g *Gateway) {
			g.APIAllow = Allow{Networks: prefixes("127.0.0.0/8", "::1/128", "10.0.0.0/8", "192.0.2.1/32"), Set: true}
		}},
		{"api access for nobody", "--api-allow none", nil, func(g *Gateway) { g.APIAllow = Allow{None: true, Set: true} }},
		{"limits", "--max-connections 1000 --max-connections-per-client 10 --max-in-flight-per-instance 20 --max-in-flight-per-service 100 --queue-timeout 0s --metrics-max-series 0", nil, func(g *Gateway) {
			g.MaxConnections, g.MaxConnectionsPerClient = Share{Number: 1000}, 10
			g.MaxInFlightPerInstance, g.MaxInFlightPerService, g.QueueTimeout, g.MetricsMaxSeries = 20, 100, 0, 0
		}},
		{"a share", "", map[string]string{"KERBEROS_MAX_CONNECTIONS": "50%"}, func(g *Gateway) { g.MaxConnections = Share{Percent: 50} }},
		{"no limit", "--max-connections 0", nil, func(g *Gateway) { g.MaxConnections = Share{} }},
		{"routes", "--route /web/=web --route /api/v1=api,/*", nil, func(g *Gateway) {
			g.Route = []Route{{Prefix: "/web/", Service: "web"}, {Prefix: "/api/v1", Service: "api"}, {Prefix: "/*", Service: ""}}
		}},
		{"a route for all", "--route /=web", nil, func(g *Gateway) { g.Route = []Route{{Prefix: "/", Service: "web"}} }},
		{"without the API on the data listener", "--api admin --health-path /register --route /services/x=services", nil, func(g *Gateway) {
			g.API, g.HealthPath, g.Route = APIAdmin, "/register", []Route{{Prefix: "/services/x", Service: "services"}}
		}},
		{"paths beside those of the API", "--health-path /services2 --route /registered=r", nil, func(g *Gateway) {
			g.HealthPath, g.Route = "/services2", []Route{{Prefix: "/registered", Service: "r"}}
		}},
		{"dots in segments", "--health-path /.well-known/up.. --route /a.b/...=a", nil, func(g *Gateway) {
			g.HealthPath, g.Route = "/.well-known/up..", []Route{{Prefix: "/a.b/...", Service: "a"}}
		}},
		{"a comma in a prefix", `--route /a\,b=a`, nil, func(g *Gateway) { g.Route = []Route{{Prefix: "/a,b", Service: "a"}} }},
		{"a prefix with =", "--route /a=b=c", nil, func(g *Gateway) { g.Route = []Route{{Prefix: "/a=b", Service: "c"}} }},
		{"statuses", "--breaker-statuses 500,503", nil, func(g *Gateway) { g.BreakerStatuses = []int{500, 503} }},
		{"paths", "--ambiguous-paths normalize", nil, func(g *Gateway) { g.AmbiguousPaths = "normalize" }},
		{"methods", "--allow-methods TRACE,CONNECT", nil, func(g *Gateway) { g.AllowMethods = []string{"TRACE", "CONNECT"} }},
		{"limits", "--max-head 1MiB --max-fields 0 --max-request-line 1000", nil, func(g *Gateway) {
			g.MaxHead, g.MaxFields, g.MaxRequestLine = 1<<20, 0, 1000
		}},
		{"upgrades", "--allow-upgrades WebSocket,foo/2 --tunnel-idle-timeout 0", nil, func(g *Gateway) {
			g.AllowUpgrades, g.TunnelIdleTimeout = []string{"websocket", "foo/2"}, 0
		}},
		{"no upgrades", "", map[string]string{"KERBEROS_ALLOW_UPGRADES": "none"}, func(g *Gateway) { g.AllowUpgrades = []string{} }},
		{"logs and traces", "--access-log a.log --access-log-format combined --access-log-sample 1% --otlp-endpoint https://c:4317 --otlp-protocol grpc --trace-sample 0.25", nil, func(g *Gateway) {
			g.AccessLog, g.AccessLogFormat, g.AccessLogSample = "a.log", "combined", 0.01
			g.OTLPEndpoint, g.OTLPProtocol, g.TraceSample = "https://c:4317", "grpc", 0.25
		}},
		{"access", "--tokens t --admin-cert a --admin-key b --admin-client-ca c", nil, func(g *Gateway) {
			g.Tokens, g.AdminCert, g.AdminKey, g.AdminClientCA = "t", "a", "b", "c"
		}},
		{"no retries", "--retries 0", nil, func(g *Gateway) { g.Retries = 0 }},
		{"environment", "", map[string]string{
			"KERBEROS_ROUTE": "/a=a,/*", "KERBEROS_VIA": "off", "KERBEROS_REQUEST_ID": "1", "KERBEROS_API_ALLOW": "none",
			"KERBEROS_BREAKER_STATUSES": "500", "KERBEROS_TOKEN": "s3cret", "KERBEROS_REQUEST_TIMEOUT": "1m30s",
		}, func(g *Gateway) {
			g.Route, g.Via, g.RequestID, g.APIAllow = []Route{{Prefix: "/a", Service: "a"}, {Prefix: "/*", Service: ""}}, false, true, Allow{None: true, Set: true}
			g.BreakerStatuses, g.Token, g.RequestTimeout = []int{500}, "s3cret", 90*time.Second
		}},
		{"second names", "", map[string]string{
			"BALANCER_STRATEGY": "ip-hash", "REQUEST_TIMEOUT": "5s", "RETRY_MAX": "0",
			"BREAKER_FAILURES": "7", "BREAKER_OPEN": "1s", "BREAKER_PROBES": "1",
		}, func(g *Gateway) {
			g.Strategy, g.RequestTimeout, g.Retries = lb.IPHash, 5*time.Second, 0
			g.BreakerFailures, g.BreakerOpen, g.BreakerProbes = 7, time.Second, 1
		}},
		{"first name before second", "", map[string]string{"RETRY_MAX": "7", "KERBEROS_RETRIES": "1"}, func(g *Gateway) { g.Retries = 1 }},
		{"flag before both", "--retries=4", map[string]string{"RETRY_MAX": "7", "KERBEROS_RETRIES": "1"}, func(g *Gateway) { g.Retries = 4 }},
		{"flag before a bad variable", "--retries 4", map[string]string{"KERBEROS_RETRIES": "many"}, func(g *Gateway) { g.Retries = 4 }},
		{"a list in a flag replaces that of a variable", "--route /b=b", map[string]string{"KERBEROS_ROUTE": "/a=a"}, func(g *Gateway) {
			g.Route = []Route{{Prefix: "/b", Service: "b"}}
		}},
		{"empty is not set", "", map[string]string{"KERBEROS_RETRIES": "", "RETRY_MAX": "1", "KERBEROS_TOKEN": ""}, func(g *Gateway) { g.Retries = 1 }},
		{"another command's variables", "other", map[string]string{"KERBEROS_LISTEN": "nonsense", "KERBEROS_RETRIES": "many"}, func(*Gateway) {}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := parse(t, strings.Fields(test.args), test.env)
			if err != nil {
				t.Fatal(err)
			}
			want := defaults
			test.want(&want)
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
	got, err := Defaults()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(defaults, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("Defaults: want -, got +:\n%s", diff)
	}
}

func TestRefused(t *testing.T) {
	noPEM := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(noPEM, []byte("nothing here"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args string
		env  map[string]string
		want []string // all of it in the error
	}{
		{"--strategy=fastest", nil, []string{"--strategy", `"fastest"`, "round-robin", "random", "weighted-round-robin", "weighted-random", "ip-hash"}},
		{"", map[string]string{"BALANCER_STRATEGY": "fastest"}, []string{"--strategy", "BALANCER_STRATEGY", `"fastest"`, "ip-hash"}},
		{"--listen 8080", nil, []string{"--listen", `"8080"`, "HOST:PORT"}},
		{"--listen :http", nil, []string{"--listen", `":http"`, "65535"}},
		{"--listen :65536", nil, []string{"--listen", `":65536"`, "65535"}},
		{"--admin on", nil, []string{"--admin", `"on"`, "HOST:PORT", "off"}},
		{"--data=", nil, []string{"--data", "empty", "directory"}},
		{"--data config.go", nil, []string{"--data", `"config.go" is a file`, "directory"}},
		{"", map[string]string{"KERBEROS_DATA": "config.go"}, []string{"KERBEROS_DATA", "is a file"}},
		{"--health-path up", nil, []string{"--health-path", `"up"`, "starts with /"}},
		{"--health-path /up?x", nil, []string{"--health-path", `"/up?x"`, "visible ASCII without"}},
		{"--health-path /%75p", nil, []string{"--health-path", `"/%75p"`, "visible ASCII without"}},
		{"--health-path /up;x", nil, []string{"--health-path", `"/up;x"`, "visible ASCII without"}},
		{"--health-path /a/../up", nil, []string{"--health-path", `"/a/../up"`, "the segment .."}},
		{"--health-path /.", nil, []string{"--health-path", `"/."`, "the segment ."}},
		{"--health-path //up", nil, []string{"--health-path", `"//up"`, "empty segment"}},
		{"--health-path /register", nil, []string{"--health-path", `"/register"`, "API", "--api=admin"}},
		{"--health-path /services --api data", nil, []string{"--health-path", `"/services"`, "API"}},
		{"--health-path /services/up", nil, []string{"--health-path", `"/services/up"`, "API"}},
		{"--api all", nil, []string{"--api", `"all"`, "data, admin, both"}},
		{"--tokens=", nil, []string{"--tokens", "name of the file is empty"}},
		{"--admin-cert a", nil, []string{"--admin-cert", "--admin-key", "belong together"}},
		{"--admin-key a", nil, []string{"--admin-cert", "--admin-key", "belong together"}},
		{"--admin-client-ca a", nil, []string{"--admin-client-ca", "give --admin-cert and --admin-key"}},
		{"--admin-cert a --admin-key b --admin off", nil, []string{"--admin-cert", "--admin=off"}},
		{"--admin-cert a --admin-key b --admin-client-ca c --api data", nil, []string{"--admin-client-ca", "--api=data"}},
		{"--api admin --admin off", nil, []string{"--api=admin", "--admin=off"}},
		{"--api-allow everyone", nil, []string{"--api-allow", `"everyone"`, "10.0.0.0/8", "loopback", "none"}},
		{"--api-allow none --api-allow ::1", nil, []string{"--api-allow", "none stands alone"}},
		{"--addr-allow 10.0.0.0/33", nil, []string{"--addr-allow", `"10.0.0.0/33"`, "network"}},
		{"--addr-deny ,", nil, []string{"--addr-deny", `""`, "network"}},
		{"--trusted-proxies fe80::1%eth0", nil, []string{"--trusted-proxies", `"fe80::1%eth0"`}},
		{"--route echo=echo", nil, []string{"--route", `"echo=echo"`, "PREFIX=SERVICE"}},
		{"--route /echo", nil, []string{"--route", `"/echo"`, "PREFIX=SERVICE"}},
		{"--route /echo=", nil, []string{"--route", `"/echo="`, "service"}},
		{"", map[string]string{"KERBEROS_ROUTE": "/a=a,b"}, []string{"--route", "KERBEROS_ROUTE", `"b"`, "PREFIX=SERVICE"}},
		{"--route=", nil, []string{"--route", `""`, "PREFIX=SERVICE"}},
		{"--addr-allow=", nil, []string{"--addr-allow", `""`, "network"}},
		{"--route /a/../b=b", nil, []string{"--route", `"/a/../b=b"`, "the segment .."}},
		{"--route /./=b", nil, []string{"--route", `"/./=b"`, "the segment ."}},
		{"--route /a//b=b", nil, []string{"--route", `"/a//b=b"`, "empty segment"}},
		{"--route //=b", nil, []string{"--route", `"//=b"`, "empty segment"}},
		{"--route /%61=b", nil, []string{"--route", `"/%61=b"`, "visible ASCII without"}},
		{"--route /a;b=b", nil, []string{"--route", `"/a;b=b"`, "visible ASCII without"}},
		{"--route /ä=b", nil, []string{"--route", `"/ä=b"`, "visible ASCII without"}},
		{"--route /register=b", nil, []string{"--route", `"/register"`, "API", "--api=admin"}},
		{"--route /register/=b", nil, []string{"--route", `"/register/"`, "API"}},
		{"--route /services/x=b --api data", nil, []string{"--route", `"/services/x"`, "API"}},
		{"--route /a=services", nil, []string{"--route", `"services"`, "cannot be a service", "--api=admin"}},
		{"--route /*,/=a", nil, []string{"--route", "/*", "beside /"}},
		{"--request-timeout -1s", nil, []string{"--request-timeout", `"-1s"`, "at least 0s"}},
		{"--retries -1", nil, []string{"--retries", `"-1"`, "at least 0"}},
		{"--request-id on", nil, []string{"--request-id=on"}},
		{"--access-log=", nil, []string{"--access-log", `""`, "stdout", "off"}},
		{"--access-log-format text", nil, []string{"--access-log-format", `"text"`, "json", "combined"}},
		{"--access-log-sample 101%", nil, []string{"--access-log-sample", `"101%"`, "0% to 100%", "0 to 1"}},
		{"--access-log-sample 2", nil, []string{"--access-log-sample", `"2"`, "0% to 100%"}},
		{"--access-log-sample NaN", nil, []string{"--access-log-sample", `"NaN"`, "0% to 100%"}},
		{"--trace-sample=-1%", nil, []string{"--trace-sample", `"-1%"`, "0% to 100%"}},
		{"--otlp-endpoint collector:4318", nil, []string{"--otlp-endpoint", `"collector:4318"`, "http://HOST:PORT"}},
		{"--otlp-endpoint http://", nil, []string{"--otlp-endpoint", `"http://"`, "http://HOST:PORT"}},
		{"--otlp-protocol udp", nil, []string{"--otlp-protocol", `"udp"`, "http", "grpc"}},
		{"--via off", nil, []string{"--via=off"}},
		{"--request-timeout 5", nil, []string{"--request-timeout", `"5"`, "30s"}},
		{"--client-min-upload 5x", nil, []string{"--client-min-upload", `"5x"`, "KiB"}},
		{"--max-body=-1", nil, []string{"--max-body", `"-1"`, "KiB"}},
		{"--shutdown-delay=-1s", nil, []string{"--shutdown-delay", `"-1s"`, "at least 0s"}},
		{"", map[string]string{"REQUEST_TIMEOUT": "soon"}, []string{"--request-timeout", "REQUEST_TIMEOUT", `"soon"`, "30s"}},
		{"--retries=-1", nil, []string{"--retries", `"-1"`, "at least 0"}},
		{"--retries=two", nil, []string{"--retries", `"two"`, "at least 0"}},
		{"--max-connections 0%", nil, []string{"--max-connections", `"0%"`, "1% to 100%"}},
		{"--max-connections 101%", nil, []string{"--max-connections", `"101%"`, "1% to 100%"}},
		{"--max-connections many", nil, []string{"--max-connections", `"many"`, "whole number"}},
		{"--max-connections=-1", nil, []string{"--max-connections", `"-1"`, "whole number"}},
		{"--max-in-flight-per-service=-1", nil, []string{"--max-in-flight-per-service", `"-1"`, "at least 0"}},
		{"--queue-timeout=-1s", nil, []string{"--queue-timeout", `"-1s"`, "at least 0s"}},
		{"--breaker-failures 0", nil, []string{"--breaker-failures", `"0"`, "at least 1"}},
		{"--breaker-probes 0", nil, []string{"--breaker-probes", `"0"`, "at least 1"}},
		{"--breaker-open 0s", nil, []string{"--breaker-open", `"0s"`, "at least 1ms"}},
		{"--breaker-statuses 200", nil, []string{"--breaker-statuses", `"200"`, "400 to 599"}},
		{"--breaker-statuses 502,", nil, []string{"--breaker-statuses", `"502,"`, "400 to 599"}},
		{"--ambiguous-paths allow", nil, []string{"--ambiguous-paths", `"allow"`, "refuse", "pass", "normalize"}},
		{"--allow-methods GET", nil, []string{"--allow-methods", `"GET"`, "CONNECT", "TRACE"}},
		{"--allow-methods trace", nil, []string{"--allow-methods", `"trace"`, "CONNECT", "TRACE"}},
		{"--allow-methods=", nil, []string{"--allow-methods", `""`, "CONNECT", "TRACE"}},
		{"--max-head 1025KiB", nil, []string{"--max-head", `"1025KiB"`, "more than 1MiB"}},
		{"--max-head 32k", nil, []string{"--max-head", `"32k"`, "32KiB"}},
		{"--max-request-line -1", nil, []string{"--max-request-line", `"-1"`, "32KiB"}},
		{"--max-fields -1", nil, []string{"--max-fields", `"-1"`, "at least 0"}},
		{"--allow-upgrades web_socket,none", nil, []string{"--allow-upgrades", `"web_socket,none"`, "foo/2"}},
		{"--allow-upgrades=", nil, []string{"--allow-upgrades", `""`, "websocket"}},
		{"--allow-upgrades foo/", nil, []string{"--allow-upgrades", `"foo/"`, "websocket"}},
		{"--allow-upgrades foo/2/3", nil, []string{"--allow-upgrades", `"foo/2/3"`, "websocket"}},
		{"--tunnel-idle-timeout -1s", nil, []string{"--tunnel-idle-timeout", `"-1s"`, "at least 0s"}},
		{"--upstream-ca /does/not/exist.pem", nil, []string{"--upstream-ca", "/does/not/exist.pem", "no such file"}},
		{"--upstream-ca " + noPEM, nil, []string{"--upstream-ca", noPEM, "no certificate"}},
		{"--via=perhaps", nil, []string{"--via", `"perhaps"`, "on nor off"}},
		{"", map[string]string{"KERBEROS_REQUEST_ID": "perhaps"}, []string{"--request-id", "KERBEROS_REQUEST_ID", `"perhaps"`}},
		{"--verbose", nil, []string{"unknown flag --verbose"}},
		{"serve", nil, []string{"serve"}},
	}
	for _, test := range tests {
		t.Run(test.args+strings.Join(slices.Sorted(maps.Keys(test.env)), " "), func(t *testing.T) {
			_, err := parse(t, strings.Fields(test.args), test.env)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in the error: %v", want, err)
				}
			}
		})
	}
}

func TestShare(t *testing.T) {
	for _, tt := range []struct {
		share Share
		whole uint64
		want  int
	}{
		{Share{Percent: 90}, 1024, 921},
		{Share{Percent: 100}, 1024, 1024},
		{Share{Percent: 1}, 10, 1},
		{Share{Percent: 90}, 1<<64 - 1, 966367641}, // no limit, as some systems write it
		{Share{Percent: 90}, 0, 0},
		{Share{Number: 7}, 1024, 7},
		{Share{}, 1024, 0},
	} {
		if got := tt.share.Of(tt.whole); got != tt.want {
			t.Errorf("%+v of %d is %d, want %d", tt.share, tt.whole, got, tt.want)
		}
	}
}

func TestTokenIsNotShown(t *testing.T) {
	for _, err := range []error{
		second(parse(t, []string{"--token", "se cret"}, nil)),
		second(parse(t, nil, map[string]string{"KERBEROS_TOKEN": "se cret"})),
		second(parse(t, []string{"other"}, map[string]string{"KERBEROS_TOKEN": "se cret"})),
	} {
		if err == nil || !strings.Contains(err.Error(), "--token") || strings.Contains(err.Error(), "cret") {
			t.Errorf("got %v, want an error that names --token and does not show it", err)
		}
	}
}

func second(_ Gateway, err error) error { return err }

func TestUpstreamCA(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(file, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := parse(t, []string{"--upstream-ca", file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.UpstreamCA.Pool == nil {
		t.Fatal("no pool")
	}
	if _, err := server.Certificate().Verify(x509.VerifyOptions{Roots: got.UpstreamCA.Pool}); err != nil {
		t.Errorf("the pool does not vouch for its own certificate: %v", err)
	}
	if _, err := parse(t, []string{"--upstream-ca", file, "--upstream-insecure"}, nil); err == nil || !strings.Contains(err.Error(), "--upstream-insecure") {
		t.Errorf("with --upstream-insecure: %v", err)
	}
}

// Every flag of the gateway has a variable, and help says all of it.
func TestHelp(t *testing.T) {
	var grammar struct {
		Run Gateway `cmd:"" default:"withargs"`
	}
	var out strings.Builder
	var exit []int
	none := func(string) (string, bool) { return "", false }
	ctx, err := Parse(&grammar, nil, none)
	if err != nil {
		t.Fatal(err)
	}
	// A process ends in its exit; here parsing goes on after it, and finds no command.
	_, _ = Parse(&grammar, []string{"--help"}, none, kong.Writers(&out, &out), kong.Exit(func(code int) { exit = append(exit, code) }))
	if !slices.Equal(exit, []int{0}) {
		t.Errorf("exits with %v, want one 0", exit)
	}
	flags := ctx.Model.Node.DefaultCmd.Flags
	if len(flags) < 20 {
		t.Fatalf("only %d flags", len(flags))
	}
	help := strings.Join(strings.Fields(out.String()), " ")
	for _, flag := range flags {
		name := "KERBEROS_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		if !strings.Contains(help, "$"+name) {
			t.Errorf("--%s: $%s is not in the help", flag.Name, name)
		}
		if flag.HasDefault && !strings.Contains(help, "default "+flag.Default) {
			t.Errorf("--%s: its default %s is not in the help", flag.Name, flag.Default)
		}
		if flag.Help == "" || flag.Group == nil {
			t.Errorf("--%s has no help or no group", flag.Name)
		}
	}
	for _, strategy := range lb.Strategies() {
		if !strings.Contains(help, string(strategy)) {
			t.Errorf("%s is not in the help", strategy)
		}
	}
}

func TestSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "4096": 4096, "1KiB": 1024, "32KiB": 32 << 10, "1MiB": 1 << 20, "2GiB": 2 << 30, "9223372036854775807": 1<<63 - 1, "8589934591GiB": 8589934591 << 30} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "KiB", "-1", "+1", "1K", "1kb", "1 KiB", "1.5MiB", "0x10", "1KiBKiB", "9223372036854775808", "8589934592GiB"} {
		if got, err := parseSize(s); err == nil || !strings.Contains(err.Error(), "32KiB") {
			t.Errorf("%q: %d, %v, want an error that says how a size is written", s, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"/a=b", "loopback,::1", "10.0.0.0/8", ":0", "[::]:80", "none", "/*", "5s", "502,503", "off", ""} {
		f.Add(seed)
	}
	flags := []string{"--listen", "--admin", "--health-path", "--api", "--api-allow", "--token", "--tokens", "--admin-cert", "--admin-key", "--admin-client-ca", "--addr-allow", "--addr-deny",
		"--trusted-proxies", "--strategy", "--route", "--request-timeout", "--retries", "--breaker-statuses", "--via", "--allow-upgrades"}
	f.Fuzz(func(t *testing.T, value string) {
		for _, flag := range flags {
			g, err := parse(t, []string{flag + "=" + value}, nil)
			if err != nil {
				if !strings.Contains(err.Error(), flag) {
					t.Errorf("%s=%q: the error does not name the flag: %v", flag, value, err)
				}
				continue
			}
			if g.RequestTimeout < 0 || g.Retries < 0 {
				t.Errorf("%s=%q is let through: %+v", flag, value, g)
			}
			for _, route := range g.Route {
				if !strings.HasPrefix(route.Prefix, "/") || (route.Service == "") != (isFirstSegment(route)) {
					t.Errorf("%s=%q gives the route %+v", flag, value, route)
				}
			}
			for _, network := range slices.Concat(g.AddrAllow, g.AddrDeny, g.TrustedProxies, g.APIAllow.Networks) {
				if !network.IsValid() || network != network.Masked() || network.Addr().Is4In6() && network.Bits() >= 96 {
					t.Errorf("%s=%q gives the network %v", flag, value, network)
				}
			}
		}
	})
}
