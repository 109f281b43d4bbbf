//go:build !linux

package proxy

// Elsewhere connections are read and written by Go's own calls, and nothing can be looked at ahead: a connection that its
// peer has closed is found out when it is used.
const socketsAreRaw = false

func readSocket(uintptr, []byte) (int, error)  { return 0, errAgain }
func writeSocket(uintptr, []byte) (int, error) { return 0, errAgain }
func peekSocket(uintptr) int                   { return -1 }
func hungUp(uintptr) bool                      { return false }
