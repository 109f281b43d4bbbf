package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kong"

	"kerberos/internal/config"
)

// API is where the gateway's API is and how to be let in.
type API struct {
	Gateway string `default:"http://127.0.0.1:9901" type:"url" placeholder:"URL" help:"Where the API is served."`
	Token   string `type:"token" placeholder:"SECRET" help:"The gateway's --token, or one of its --tokens."`
	TLS

	flag string        // that gave Gateway; empty: --gateway
	wait time.Duration // longer than usual, for an answer
}

// TLS is how to speak to a gateway that has --admin-cert.
type TLS struct {
	CA   config.Authorities `name:"ca" placeholder:"FILE" help:"PEM file of the authorities of an https gateway, instead of the system's."`
	Cert string             `type:"file" placeholder:"FILE" help:"PEM file of the certificate that says who calls, for a gateway with --admin-client-ca."`
	Key  string             `type:"file" placeholder:"FILE" help:"PEM file of its key."`
}

// AfterApply checks what no single flag can know.
func (t *TLS) AfterApply() error {
	if (t.Cert == "") != (t.Key == "") {
		return errors.New("--cert and --key belong together: give both or none")
	}
	return nil
}

// client is one for a single call, or the one that all share.
func (t *TLS) client() (*http.Client, error) {
	if t.CA.Pool == nil && t.Cert == "" {
		return http.DefaultClient, nil
	}
	secure := &tls.Config{RootCAs: t.CA.Pool, MinVersion: tls.VersionTLS12}
	if t.Cert != "" {
		pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
		if err != nil {
			return nil, fmt.Errorf("--cert %s and --key %s: %w", t.Cert, t.Key, err)
		}
		secure.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: secure, DisableKeepAlives: true}}, nil
}

// problem is a refusal of the API (RFC 9457). It names the field that is wrong, if one is.
type problem struct {
	Status int
	Title  string
	Detail string
	Field  string
}

func (p *problem) Error() string {
	text := p.Detail
	if text == "" {
		text = p.Title
	}
	if p.Field != "" && !strings.HasPrefix(text, p.Field) {
		text = p.Field + ": " + text
	}
	return fmt.Sprintf("%s (%d)", text, p.Status)
}

// errNotTheAPI is an answer that no gateway gives: something else listens there.
var errNotTheAPI = errors.New("this is not an answer from the API of a gateway")

// maxAnswer bounds what is read of an answer: about 100,000 instances.
const maxAnswer = 64 << 20

// call sends body as JSON unless it is nil, and returns the body of the answer. A refusal is a *problem.
func (a *API) call(ctx context.Context, method, path string, body any) ([]byte, error) {
	var reader io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		reader = bytes.NewReader(data)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second+a.wait)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, a.Gateway+path, reader)
	if err != nil {
		return nil, err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if a.Token != "" {
		request.Header.Set("Authorization", "Bearer "+a.Token)
	}
	client, err := a.client()
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: is a gateway running there? see %s", err, cmp.Or(a.flag, "--gateway"))
	}
	if errors.Is(err, io.EOF) && strings.HasPrefix(a.Gateway, "http:") {
		return nil, fmt.Errorf("%w: a gateway with --admin-cert wants https there; see %s", err, cmp.Or(a.flag, "--gateway"))
	}
	if err != nil {
		return nil, err // names method and URL
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("%s %s%s: %w", method, a.Gateway, path, err)
	}
	if response.StatusCode/100 == 2 {
		return answer, nil
	}
	refusal := &problem{Status: response.StatusCode}
	if response.Header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(answer, refusal) != nil {
		return nil, fmt.Errorf("%s %s%s: %s: %w", method, a.Gateway, path, response.Status, errNotTheAPI)
	}
	return nil, refusal
}

// Register adds an instance to a service, or changes it.
type Register struct {
	API
	Service string        `arg:"" help:"The service's name."`
	ID      string        `arg:"" name:"id" help:"The instance's id, unique in its service."`
	Addr    string        `arg:"" help:"Where it listens: http://HOST:PORT or https://HOST:PORT, with a base path if it has one."`
	Weight  int           `default:"0" min:"0" noenv:"" help:"Its share under the weighted strategies."`
	TTL     time.Duration `name:"ttl" default:"0s" min:"0s" noenv:"" help:"A lease of 1s to 24h: unless it is registered again or sends a heartbeat, the instance leaves after that time. 0s is none."`

	Metadata map[string]string `mapsep:"none" placeholder:"NAME=VALUE" noenv:"" help:"What others should know about it; repeatable."`

	Check     Check         `embed:"" prefix:"check-"`
	SlowStart time.Duration `default:"0s" min:"0s" noenv:"" help:"How long its share grows whenever it comes into balance, up to 1h. 0s is none."`
}

// Check is how the gateway asks an instance whether it can serve; without a Path and TCP it does not. The defaults are those of
// the API.
type Check struct {
	Path      string        `placeholder:"PATH" noenv:"" help:"The gateway asks for this, over and over; while the answer is not one of --check-status, the instance gets no requests."`
	TCP       bool          `name:"tcp" noenv:"" help:"The same, but it only connects."`
	Interval  time.Duration `default:"2s" min:"100ms" noenv:"" help:"From one check to the next, up to 1h."`
	Timeout   time.Duration `default:"0s" min:"0s" noenv:"" help:"For the whole of one, 100ms to 1m. 0s is 1s, or the interval if that is shorter."`
	Fall      int           `default:"3" min:"1" noenv:"" help:"So many in a row that fail take it out."`
	Rise      int           `default:"2" min:"1" noenv:"" help:"So many in a row that pass bring it back."`
	Status    string        `placeholder:"LIST" noenv:"" help:"Statuses and ranges that pass, such as 200-299,404; else 200-399."`
	KeepAlive bool          `noenv:"" help:"One connection for many checks."`
	Start     string        `default:"down" enum:"down,up" noenv:"" help:"A new instance waits for its first check (down) or does not (up)."`
}

// AfterApply refuses what says how to check where nothing is to be checked.
func (c *Check) AfterApply(ctx *kong.Context) error {
	for _, given := range ctx.Path {
		if given.Flag != nil && strings.HasPrefix(given.Flag.Name, "check-") && c.Path == "" && !c.TCP {
			return fmt.Errorf("--%s: there is nothing to check without a --check-path, or --check-tcp", given.Flag.Name)
		}
	}
	return nil
}

// body is what /register takes; nil: none.
func (c *Check) body() map[string]any {
	if c.Path == "" && !c.TCP {
		return nil
	}
	body := map[string]any{"interval": c.Interval.String(), "fall": c.Fall, "rise": c.Rise, "start": c.Start}
	if c.Path != "" {
		body["path"] = c.Path
	}
	if c.TCP {
		body["tcp"] = true
	}
	if c.Timeout > 0 {
		body["timeout"] = c.Timeout.String()
	}
	if c.Status != "" {
		body["status"] = c.Status
	}
	if c.KeepAlive {
		body["keep_alive"] = true
	}
	return body
}

// registration is the body of /register.
type registration struct {
	Service string `json:"service"`
	ID      string `json:"id"`
	Addr    string `json:"addr,omitempty"`
	Weight  int    `json:"weight,omitempty"`
	TTL     string `json:"ttl,omitempty"`
	Drain   string `json:"drain,omitempty"`

	Metadata map[string]string `json:"metadata,omitempty"`

	Check     map[string]any `json:"check,omitempty"`
	SlowStart string         `json:"slow_start,omitempty"`
}

// Run registers the instance.
func (c *Register) Run(p *Process) error {
	in := registration{Service: c.Service, ID: c.ID, Addr: c.Addr, Weight: c.Weight, Metadata: c.Metadata, Check: c.Check.body()}
	if c.SlowStart > 0 {
		in.SlowStart = c.SlowStart.String()
	}
	if c.TTL > 0 {
		in.TTL = c.TTL.String()
	}
	if _, err := c.call(p.Context, http.MethodPost, "/register", in); err != nil {
		return err
	}
	_, err := fmt.Fprintf(p.Out, "registered %s/%s at %s\n", c.Service, c.ID, c.Addr)
	return err
}

// Unregister takes an instance out of a service.
type Unregister struct {
	API
	Service string        `arg:"" help:"The service's name."`
	ID      string        `arg:"" name:"id" help:"The instance's id."`
	Addr    string        `placeholder:"URL" noenv:"" help:"Only while it is registered with this addr: a successor with the same id stays."`
	Drain   time.Duration `default:"0s" min:"0s" noenv:"" help:"It gets no new requests at once, and leaves when its last one has ended, or after this time. 0s is at once."`
}

// Run unregisters the instance. One that is gone already is as it should be.
func (c *Unregister) Run(p *Process) error {
	in := registration{Service: c.Service, ID: c.ID, Addr: c.Addr}
	if c.wait = c.Drain; c.Drain > 0 {
		in.Drain = c.Drain.String()
	}
	answer, err := c.call(p.Context, http.MethodDelete, "/register", in)
	if gone(err) {
		_, err = fmt.Fprintf(p.Out, "%s/%s was not registered\n", c.Service, c.ID)
		return err
	}
	if taken(err) {
		_, err = fmt.Fprintf(p.Out, "%s/%s is registered with another addr: it stays\n", c.Service, c.ID)
		return err
	}
	if err != nil {
		return err
	}
	how := ""
	if c.Drain > 0 {
		var drained struct {
			Cut    int
			Waited string
		}
		if err := json.Unmarshal(answer, &drained); err != nil {
			return fmt.Errorf("%w: %w", errNotTheAPI, err)
		}
		how = fmt.Sprintf(" after %s, %d cut", drained.Waited, drained.Cut)
	}
	_, err = fmt.Fprintf(p.Out, "unregistered %s/%s%s\n", c.Service, c.ID, how)
	return err
}

// gone tells whether the API knows no such instance. A 404 that names neither service nor id is about the path.
func gone(err error) bool {
	var refusal *problem
	return errors.As(err, &refusal) && refusal.Status == http.StatusNotFound && refusal.Field != ""
}

// taken tells whether the id stands with another addr than the one that was meant.
func taken(err error) bool {
	var refusal *problem
	return errors.As(err, &refusal) && refusal.Status == http.StatusConflict && refusal.Field == "addr"
}

// Services lists who is registered and how they do.
type Services struct {
	API
	Service string `arg:"" optional:"" help:"Only this one."`
	JSON    bool   `name:"json" noenv:"" help:"Print what the API answers, as it is."`
}

// service, instance and expired are what is shown of GET /services.
type service struct {
	Name, Strategy, Why string
	InForce             string `json:"in_force"`
	Instances           []instance
}

type instance struct {
	ID, Addr, Reason string
	Weight           int
	Ready            bool
	Breaker          struct {
		State string
		Until *time.Time
	}
	InFlight  int64 `json:"in_flight"`
	Tunnels   int64
	LastError string `json:"last_error"`
	Success   uint64
	Failure   uint64
}

type expired struct {
	Service, ID, Addr string
	ExpiredAt         time.Time `json:"expired_at"`
}

// Run prints a line for each instance.
func (c *Services) Run(p *Process) error {
	path := "/services"
	if c.Service != "" {
		path += "/" + url.PathEscape(c.Service)
	}
	answer, err := c.call(p.Context, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	if c.JSON {
		_, err := fmt.Fprintf(p.Out, "%s\n", bytes.TrimSpace(answer))
		return err
	}
	services, expired, err := decode(answer, c.Service != "")
	if err != nil {
		return err
	}
	if len(services) == 0 {
		_, err = fmt.Fprintln(p.Out, "no services are registered")
	} else {
		err = table(p.Out, services)
	}
	for _, e := range expired {
		if err == nil {
			_, err = fmt.Fprintf(p.Out, "%s/%s at %s has expired, %s\n", e.Service, e.ID, e.Addr, e.ExpiredAt.Format(time.RFC3339))
		}
	}
	return err
}

// decode reads the answer for one service or for all.
func decode(answer []byte, one bool) ([]service, []expired, error) {
	var all struct {
		Services []service
		Expired  []expired
	}
	var err error
	if one {
		all.Services = make([]service, 1)
		err = json.Unmarshal(answer, &all.Services[0])
	} else {
		err = json.Unmarshal(answer, &all)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNotTheAPI, err)
	}
	return all.Services, all.Expired, nil
}

func table(out io.Writer, services []service) error {
	return columns(out, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "SERVICE\tSTRATEGY\tINSTANCE\tADDR\tWEIGHT\tREADY\tBREAKER\tIN FLIGHT\tTUNNELS\tSUCCESS\tFAILURE\tNOTE")
		for _, s := range services {
			for _, in := range s.Instances {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\t%d\t%d\t%d\t%s\n", s.Name, s.InForce, in.ID, in.Addr, in.Weight,
					yesNo(in.Ready), in.Breaker.State, in.InFlight, in.Tunnels, in.Success, in.Failure, note(s, in))
			}
		}
	})
}

// columns prints lines whose cells end with tabs.
func columns(out io.Writer, lines func(*tabwriter.Writer)) error {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	lines(w)
	if err := w.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(text.String()) { // without the spaces that an empty last column leaves
		if _, err := fmt.Fprintln(out, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func yesNo(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// note is why an instance or its service's strategy is not as one would expect, or nothing.
func note(s service, in instance) string {
	var notes []string
	if in.Reason != "" {
		notes = append(notes, in.Reason)
	}
	if in.LastError != "" {
		notes = append(notes, "last error: "+in.LastError)
	}
	if s.Why != "" {
		notes = append(notes, "not "+s.Strategy+": "+s.Why)
	}
	return strings.Join(notes, "; ")
}
