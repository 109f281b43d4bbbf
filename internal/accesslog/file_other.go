//go:build !unix

package accesslog

import "os"

const nonblock = 0

func stdout() (*os.File, error) { return os.Stdout, nil }

// NotifyReopen has c told when somebody asks for Log.Reopen: by SIGUSR1, where there is one.
func NotifyReopen(chan<- os.Signal) {}
