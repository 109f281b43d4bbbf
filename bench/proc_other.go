//go:build !linux

package main

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

func pickCPUs() cpus { return cpus{} }

func startOn(_ cpuSet, cmd *exec.Cmd) error { return cmd.Start() }

func childAttr() *syscall.SysProcAttr { return nil }

func kill(p *os.Process) { p.Kill() }

func processTree(root int) ([]int, error) { return []int{root}, nil }

// usageOf knows nothing here: the table shows a dash.
func usageOf([]int) (usage, error) { return usage{}, nil }

func openFiles() int { return 1024 }

func describeMachine() (cpu, system string) { return runtime.GOARCH, runtime.GOOS }
