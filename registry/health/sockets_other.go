//go:build !linux

package health

import "net/netip"

// sockets are not here: each check has a goroutine.
type sockets struct{}

type socket struct{}

func newSockets(*Checker) *sockets { return nil }

func (*sockets) start(*Watch, []netip.AddrPort) {}
func (*sockets) late(*Watch)                    {}
func (*sockets) poll()                          {}
func (*sockets) busy() bool                     { return false }
func (*sockets) drop(*Watch)                    {}
func (*sockets) trim()                          {}
func (*sockets) close()                         {}
