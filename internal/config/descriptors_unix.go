//go:build unix

package config

import "golang.org/x/sys/unix"

// Descriptors is how many the process may have open; 0: nobody knows. At its start Go has raised the soft limit to the
// hard one.
func Descriptors() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return uint64(limit.Cur)
}
