//go:build !linux

package main

import (
	"errors"
	"net/netip"
)

const canPump = false

func servePump(netip.AddrPort, bool, func(string)) error { return errors.New("the pump needs Linux") }
