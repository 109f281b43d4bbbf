//go:build !linux

package soak

import "errors"

// CanGauge says whether this system tells what a process holds.
const CanGauge = false

// GaugesOf returns an error.
func GaugesOf(int, string, string) (Gauges, error) {
	return Gauges{}, errors.New("this system does not tell what a process holds")
}

func kernelAborts() int { return 0 }
