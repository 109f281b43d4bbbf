package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/valyala/fasthttp"
)

// Right is what a caller may do with a service.
type Right string

// The rights.
const (
	RightRead     Right = "read"     // the GETs
	RightRegister Right = "register" // the calls that change something, a heartbeat among them
	RightAdmin    Right = "admin"    // what is about the gateway itself and no service
)

// Caller is who makes a call of the API. The handler asks it once it knows which service the call is about.
type Caller interface {
	Name() string                           // for answers and the log
	May(right Right, service string) bool   // by the rights that it was let in with
	Still(right Right, service string) bool // by those that it has now
	Networks() []netip.Prefix               // to which instances that it registers may point; none: wherever AddrPolicy lets them
}

// Administers reports whether who makes a call has all rights.
func Administers(ctx *fasthttp.RequestCtx) bool { return callerOf(ctx).May(RightAdmin, "") }

type callerKey struct{}

// SetCaller says who makes a call, before the handler sees it. Without it the call is allowed everything.
func SetCaller(ctx *fasthttp.RequestCtx, c Caller) { ctx.SetUserValue(callerKey{}, c) }

func callerOf(ctx *fasthttp.RequestCtx) Caller {
	if c, ok := ctx.UserValue(callerKey{}).(Caller); ok {
		return c
	}
	return anyone{}
}

// anyone is who calls a handler that nobody guards.
type anyone struct{}

func (anyone) Name() string             { return "anyone" }
func (anyone) May(Right, string) bool   { return true }
func (anyone) Still(Right, string) bool { return true }
func (anyone) Networks() []netip.Prefix { return nil }

// permit refuses a call whose caller has no right to it. It says nothing of what is there.
func permit(ctx *fasthttp.RequestCtx, right Right, service string) error {
	c := callerOf(ctx)
	if c.May(right, service) {
		return nil
	}
	help := "its rights are neither admin nor register for this service"
	if right == RightRead {
		help = "its rights are none of admin, read and register for this service"
	}
	return &refusal{fasthttp.StatusForbidden, "service", fmt.Sprintf("%s has no right to %s service %s: %s", c.Name(), right, clip(service), help)}
}

type outsideKey struct{}

// Outside tells of a call that the handler has refused whether it was for Caller.Networks: which instance (service/id) was to be
// at which addr outside them. Otherwise both are empty.
func Outside(ctx *fasthttp.RequestCtx) (instance, addr string) {
	if out, ok := ctx.UserValue(outsideKey{}).(*outsideError); ok {
		return out.instance, out.addr
	}
	return "", ""
}

// audit notes a change that a call has made.
func (a *api) audit(ctx *fasthttp.RequestCtx, action, service, id string, what ...slog.Attr) {
	attrs := append(make([]slog.Attr, 0, 12), slog.String("action", action), slog.String("instance", service+"/"+id),
		slog.String("by", callerOf(ctx).Name()), slog.String("peer", ctx.RemoteAddr().String()))
	a.reg.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, "registration changed", append(attrs, what...)...)
}

// auditChange notes what is another in now than it was before; before is nil if it is new. It notes nothing if all is the
// same, or if now is nil.
func (a *api) auditChange(ctx *fasthttp.RequestCtx, action, service string, before, now *Instance) {
	if now == nil || !a.reg.cfg.Log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	if changed := now.differs(before, make([]slog.Attr, 0, 11)); len(changed) > 0 {
		a.audit(ctx, action, service, now.ID, changed...)
	}
}

// differs appends what is another in an instance than it was before, and under "was" what that was; before is nil if it is new.
func (in *Instance) differs(before *Instance, changed []slog.Attr) []slog.Attr {
	old := new(Instance).settings()
	if before != nil {
		old = before.settings()
	}
	var was []slog.Attr
	for i, attr := range in.settings() {
		if attr.Equal(old[i]) {
			continue
		}
		changed = append(changed, attr)
		if before != nil {
			was = append(was, old[i])
		}
	}
	if len(was) > 0 {
		changed = append(changed, slog.Attr{Key: "was", Value: slog.GroupValue(was...)})
	}
	return changed
}

// settings are what of an instance a call can change: where its name may lead, too, which follows from who registers it.
func (in *Instance) settings() [12]slog.Attr {
	override := 0
	if in.Override.Weight != nil {
		override = *in.Override.Weight
	}
	networks := ""
	if len(in.networks) > 0 {
		networks = strings.Trim(fmt.Sprint(in.networks), "[]")
	}
	return [...]slog.Attr{
		slog.String("addr", in.Addr), slog.Int("weight", in.registered.weight), slog.String("ttl", in.TTL.String()), slog.Bool("held", in.hold != nil),
		slog.Int("override_weight", override), slog.String("override_state", string(in.Override.State)),
		slog.String("check", checkText(in.Check)), slog.String("slow_start", in.SlowStart.String()),
		slog.String("metadata", pairs(in.registered.metadata)), slog.String("override_metadata", pairs(in.Override.Metadata)),
		slog.Bool("remote", in.remote), slog.String("networks", networks),
	}
}

// checkText is a check as one text.
func checkText(c *Check) string {
	if c == nil {
		return ""
	}
	text, err := c.MarshalJSON()
	if err != nil {
		panic(err) // texts and numbers, into memory
	}
	return string(text)
}

// pairs are metadata as one text, the same for the same.
func pairs(metadata map[string]string) string {
	if len(metadata) == 0 {
		return ""
	}
	text, err := json.Marshal(metadata) // in the order of its keys
	if err != nil {
		panic(err) // strings, into memory
	}
	return string(text)
}
