package cli

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kong"
)

// Explain says what a request would find.
type Explain struct {
	API
	Request []string `arg:"" name:"[method] url-or-path" help:"GET unless a method comes first; then a path as clients send it, /users/1?x=y, or a URL whose host is the Host field."`
	Host    string   `placeholder:"NAME" noenv:"" help:"The Host field, else that of the URL, or localhost."`
	Client  string   `placeholder:"ADDR" noenv:"" help:"The address that the request comes from, else that of this command."`
	Header  []string `sep:"none" placeholder:"NAME: VALUE" noenv:"" help:"Another header field; repeatable."`
	JSON    bool     `name:"json" noenv:"" help:"Print what the gateway answers, as it is."`

	method, target string
}

// AfterApply takes the words of the request apart.
func (c *Explain) AfterApply(ctx *kong.Context) error {
	c.method = "GET"
	switch len(c.Request) {
	case 1:
	case 2:
		c.method = c.Request[0]
	default:
		return fmt.Errorf("explain takes a method, which may be left out, and a URL or path, not %d words", len(c.Request))
	}
	var host string
	c.target = c.Request[len(c.Request)-1]
	if scheme, rest, ok := strings.Cut(c.target, "://"); ok && (strings.EqualFold(scheme, "http") || strings.EqualFold(scheme, "https")) {
		rest, _, _ = strings.Cut(rest, "#") // which no client sends
		end := strings.IndexAny(rest, "/?")
		if end < 0 {
			end = len(rest)
		}
		if host, c.target = rest[:end], rest[end:]; !strings.HasPrefix(c.target, "/") {
			c.target = "/" + c.target
		}
	} else if !strings.HasPrefix(c.target, "/") && c.target != "*" && c.method != "CONNECT" {
		return fmt.Errorf("%q is neither a path, such as /users/1, nor a URL, such as http://example.com/users/1", c.target)
	}
	c.Host = cmp.Or(c.Host, host)
	return nil
}

// explained is what is shown of GET /explain.
type explained struct {
	Request struct{ Method, Host, Path string }
	Client  string

	Connection *outcome
	Outcome    outcome
	Route      *explainedRoute
	Near       []explainedRoute
	Service    *struct {
		service
		Instances []explainedInstance
		Ready     int
		Breaker   struct {
			Failures, Probes int
			OpenFor          string `json:"open_for"`
			Statuses         []int
		}
		Limits struct {
			InFlight            int64 `json:"in_flight"`
			InFlightPerService  int   `json:"in_flight_per_service"`
			InFlightPerInstance int   `json:"in_flight_per_instance"`
			Waiting, Queue      int64
			QueueTimeout        string `json:"queue_timeout"`
		}
		Expired []expired
	}
}

type outcome struct {
	Kind, Instance, Error, Why string
	Status                     int
	RetryAfter                 int `json:"retry_after"`
}

type explainedRoute struct{ Match, Service, Why string }

type explainedInstance struct {
	instance
	Override *struct{ Weight *int }
	Lease    *struct {
		Held, Stale bool
		ExpiresIn   string `json:"expires_in"`
	}
	Share     float64
	SlowShare *float64 `json:"slow_share"`
	Full      bool
	OpenedBy  string `json:"opened_by"`
	Addresses []string
}

// Run asks the gateway and prints its answer.
func (c *Explain) Run(p *Process) error {
	query := url.Values{"path": {c.target}, "method": {c.method}, "header": c.Header}
	if c.Host != "" {
		query.Set("host", c.Host)
	}
	if c.Client != "" {
		query.Set("client", c.Client)
	}
	answer, err := c.call(p.Context, http.MethodGet, "/explain?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	if c.JSON {
		_, err := fmt.Fprintf(p.Out, "%s\n", bytes.TrimSpace(answer))
		return err
	}
	var e explained
	if err := json.Unmarshal(answer, &e); err != nil {
		return fmt.Errorf("%w: %w", errNotTheAPI, err)
	}
	if e.Outcome.Kind == "" {
		return errNotTheAPI
	}
	return e.print(p.Out)
}

func (e *explained) print(out io.Writer) error {
	err := columns(out, func(w *tabwriter.Writer) {
		fmt.Fprintf(w, "request\t%s %s at %s from %s\n", e.Request.Method, e.Request.Path, e.Request.Host, e.Client)
		if e.Connection != nil {
			fmt.Fprintf(w, "connection\t%s\n", e.Connection)
		}
		fmt.Fprintf(w, "outcome\t%s\n", &e.Outcome)
		if e.Route != nil {
			fmt.Fprintf(w, "route\t%s\n", e.Route)
		}
		for i := range e.Near {
			fmt.Fprintf(w, "not\t%s\n", &e.Near[i])
		}
		s := e.Service
		if s == nil {
			return
		}
		strategy := s.InForce
		if s.Why != "" {
			strategy += ", not " + s.Strategy + ", as " + s.Why
		}
		fmt.Fprintf(w, "service\t%s, %d of %d ready; %s\n", s.Name, s.Ready, len(s.Instances), strategy)
		fmt.Fprintf(w, "breaker\topens for %s after %d failures in a row, %s among them; closes after %d probes\n",
			s.Breaker.OpenFor, s.Breaker.Failures, strings.Trim(strings.ReplaceAll(fmt.Sprint(s.Breaker.Statuses), " ", ", "), "[]"), s.Breaker.Probes)
		l := &s.Limits
		limits := fmt.Sprintf("%d in flight", l.InFlight)
		if l.InFlightPerService > 0 {
			limits += fmt.Sprintf(" of %d", l.InFlightPerService)
		}
		if l.InFlightPerInstance > 0 {
			limits += fmt.Sprintf(", at most %d at one instance", l.InFlightPerInstance)
		}
		if l.InFlightPerService > 0 || l.InFlightPerInstance > 0 {
			limits += fmt.Sprintf("; %d of %d wait, for %s at most", l.Waiting, l.Queue, l.QueueTimeout)
		} else {
			limits += ", without a limit"
		}
		fmt.Fprintf(w, "requests\t%s\n", limits)
		for _, x := range s.Expired {
			fmt.Fprintf(w, "expired\t%s at %s, %s\n", x.ID, x.Addr, x.ExpiredAt.Format(time.RFC3339))
		}
	})
	if err != nil || e.Service == nil || len(e.Service.Instances) == 0 {
		return err
	}
	return columns(out, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "INSTANCE\tADDR\tREADY\tWEIGHT\tSHARE\tBREAKER\tIN FLIGHT\tNOTE")
		for i := range e.Service.Instances {
			in := &e.Service.Instances[i]
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", in.ID, in.Addr, yesNo(in.Ready), in.weight(), in.share(), in.breaker(), in.InFlight, in.note())
		}
	})
}

func (o *outcome) String() string {
	switch {
	case o.Kind == "instance":
		return "goes to " + o.Instance + ": " + o.Why
	case o.Kind == "queue":
		return fmt.Sprintf("waits, or else %d %s: %s", o.Status, o.Error, o.Why)
	case o.Status == 0:
		return o.Why
	}
	text := strings.TrimSpace(fmt.Sprintf("%d %s", o.Status, o.Error))
	if o.RetryAfter > 0 {
		text += fmt.Sprintf(", Retry-After %d", o.RetryAfter)
	}
	return text + ": " + o.Why
}

func (r *explainedRoute) String() string {
	text := r.Match
	if r.Service != "" {
		text += " to " + r.Service
	}
	return text + ": " + r.Why
}

func (in *explainedInstance) weight() string {
	if in.Override != nil && in.Override.Weight != nil {
		return fmt.Sprintf("%d, set", in.Weight)
	}
	return fmt.Sprint(in.Weight)
}

func (in *explainedInstance) share() string {
	text := fmt.Sprintf("%g%%", math.Round(in.Share*1000)/10)
	if in.SlowShare != nil {
		text += fmt.Sprintf(", slowly at %g%%", math.Round(*in.SlowShare*100))
	}
	return text
}

func (in *explainedInstance) breaker() string {
	if until := in.Breaker.Until; until != nil {
		return in.Breaker.State + " until " + until.Format(time.RFC3339)
	}
	return in.Breaker.State
}

// note is what stands in the way of an instance, and what else is to be known of it.
func (in *explainedInstance) note() string {
	var notes []string
	add := func(is bool, text string) {
		if is {
			notes = append(notes, text)
		}
	}
	add(in.Reason != "", in.Reason)
	add(in.Full, "full")
	add(in.OpenedBy != "", in.OpenedBy)
	add(in.LastError != "" && !strings.HasSuffix(in.OpenedBy, in.LastError), "last error: "+in.LastError)
	if l := in.Lease; l != nil {
		add(l.Held, "held by a connection")
		add(l.ExpiresIn != "", "expires in "+l.ExpiresIn)
		add(l.Stale, "stale")
	}
	if len(in.Addresses) > 0 && !strings.Contains(in.Addr, "//"+in.Addresses[0]) {
		add(true, "at "+strings.Join(in.Addresses, " "))
	}
	return strings.Join(notes, "; ")
}
