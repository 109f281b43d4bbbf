//go:build !race

package lb

// raceEnabled: the race detector makes everything slower by a factor and allocates on its own.
const raceEnabled = false
