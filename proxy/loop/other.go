//go:build !linux

package loop

import (
	"errors"
	"net"
	"net/netip"
	"time"
)

// Supported says whether there are loops on this system. Without them nothing here makes a Group, a Socket or a Listener.
const Supported = false

// What the code around loops names; see the files for Linux.
const (
	Readable Events = 1 << iota
	Writable
	HangUp
	Over
)

var ErrAgain = errors.New("not ready")

var errUnsupported = errors.New("no loops on this system")

type Group struct{ Loops []*Loop }

func New(int, func(int, time.Time) time.Duration) (*Group, error) { return nil, errUnsupported }

func (*Group) Close() {}

type Loop struct{}

func (*Loop) Now() time.Time                                            { return time.Time{} }
func (*Loop) Within(time.Duration)                                      {}
func (*Loop) Do(func()) bool                                            { return false }
func (*Loop) Go(func())                                                 {}
func (*Loop) Blame(Handler)                                             {}
func (*Loop) Guard(Handler, func())                                     {}
func (*Loop) Call(func()) bool                                          { return false }
func (*Loop) Watch(int, netip.AddrPort, Handler, bool) (*Socket, error) { return nil, errUnsupported }
func (*Loop) Listen(*net.TCPListener) (*Listener, error)                { return nil, errUnsupported }
func (*Loop) Connect(netip.AddrPort, Handler, bool) (*Socket, error)    { return nil, errUnsupported }

type Socket struct{ net.Conn }

func (*Socket) Connecting() bool               { return false }
func (*Socket) Connected() error               { return errUnsupported }
func (*Socket) AwaitConnected(time.Time) error { return errUnsupported }
func (*Socket) SetHandler(Handler)             {}
func (*Socket) Hold()                          {}
func (*Socket) Let()                           {}
func (*Socket) Forget()                        {}
func (*Socket) Held() bool                     { return false }
func (*Socket) TryRead([]byte) (int, error)    { return 0, errUnsupported }
func (*Socket) TryWrite([]byte) (int, error)   { return 0, errUnsupported }
func (*Socket) Again()                         {}
func (*Socket) Peek() int                      { return -1 }
func (*Socket) HungUp() bool                   { return false }
func (*Socket) OnHangUp(func())                {}
func (*Socket) Queued() int                    { return -1 }
func (*Socket) Lost() bool                     { return false }
func (*Socket) Ended() bool                    { return false }
func (*Socket) CloseRead() error               { return errUnsupported }
func (*Socket) CloseWrite() error              { return errUnsupported }
func (*Socket) Shutdown() error                { return errUnsupported }
func (*Socket) SetLinger(int) error            { return errUnsupported }

type Listener struct{}

func (*Listener) Accept() (int, netip.AddrPort, error) { return -1, netip.AddrPort{}, errUnsupported }

func (*Listener) Addr() net.Addr { return nil }

func (*Listener) Close() error { return errUnsupported }

func Discard(int) {}

type Pipe struct{}

func (*Group) Pipe() (*Pipe, error)                   { return nil, errUnsupported }
func (*Group) Release(*Pipe, bool)                    {}
func (*Socket) SpliceTo(*Pipe, int64) (int, error)    { return 0, errUnsupported }
func (*Socket) SpliceFrom(*Pipe, int) (int, error)    { return 0, errUnsupported }
func (*Socket) TrySpliceTo(*Pipe) (int, error)        { return 0, errUnsupported }
func (*Socket) TrySpliceFrom(*Pipe, int) (int, error) { return 0, errUnsupported }
