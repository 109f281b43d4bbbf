package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// confined is a caller of the API whose instances may point to some networks only.
type confined []netip.Prefix

func (confined) Name() string                      { return "the test" }
func (confined) May(registry.Right, string) bool   { return true }
func (confined) Still(registry.Right, string) bool { return true }
func (networks confined) Networks() []netip.Prefix { return networks }

// A name that moves out of the networks of who registered it is not ready, nor is one of which they have become narrower.
func TestNamesOutsideNetworks(t *testing.T) {
	g := startGateway(t, nil, nil)
	a := startActor(t, says("a"))
	api := registry.NewHandler(g.reg, nil)
	register := func(networks ...string) {
		t.Helper()
		var c confined
		for _, n := range networks {
			c = append(c, netip.MustParsePrefix(n))
		}
		ctx := fasthttp.RequestCtx{}
		ctx.Init(&fasthttp.Request{}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, nil)
		ctx.Request.Header.SetMethod("PUT")
		ctx.Request.SetRequestURI("/services/echo/a")
		ctx.Request.Header.SetContentType("application/json")
		ctx.Request.SetBodyString(fmt.Sprintf(`{"addr":"http://confined.test:%d"}`, a.port()))
		registry.SetCaller(&ctx, c)
		api(&ctx)
		if ctx.Response.StatusCode() != 204 {
			t.Fatal(ctx.Response.String())
		}
	}
	names.set("confined.test", "127.0.0.1")
	register("127.0.0.0/24", "10.0.0.0/8")
	g.awaitReady(t, 1)
	c := g.dial(t)
	c.picks(1)

	names.set("confined.test", "127.0.1.1")
	g.resolveNow("a")
	g.awaitReason(t, "a", "none of the networks")
	g.awaitReady(t, 0)
	c.get("/echo").refused(t, errNoInstance)
	names.set("confined.test", "127.0.1.1", "127.0.0.1")
	g.resolveNow("a")
	g.awaitReady(t, 1)
	if got := g.addresses("a"); len(got) != 1 || got[0] != "127.0.0.1" {
		t.Errorf("dialled at %v", got)
	}
	c.picks(1)

	register("10.0.0.0/8")
	eventually(t, "its idle connection is closed", func() bool { return a.open() == 0 })
	c.get("/echo").refused(t, errProhibited)
	register()
	c.picks(1)
}
