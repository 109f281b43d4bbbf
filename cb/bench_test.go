package cb

import (
	"errors"
	"testing"
	"time"

	"github.com/sony/gobreaker/v2"
)

// The healthy pair, Allow and Success, beside the same of gobreaker alone.

func BenchmarkHealthy(b *testing.B) {
	g := newGate(b, Config{}, nil)
	b.ReportAllocs()
	for b.Loop() {
		t, ok := g.Allow()
		if !ok {
			b.Fatal("refused")
		}
		g.Success(t)
	}
}

func BenchmarkHealthyParallel(b *testing.B) {
	g := newGate(b, Config{}, nil)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			t, ok := g.Allow()
			if !ok {
				b.Error("refused")
			}
			g.Success(t)
		}
	})
}

func BenchmarkGobreaker(b *testing.B) {
	plain := gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{})
	b.ReportAllocs()
	for b.Loop() {
		done, err := plain.Allow()
		if err != nil {
			b.Fatal(err)
		}
		done(nil)
	}
}

func BenchmarkGobreakerParallel(b *testing.B) {
	plain := gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			done, err := plain.Allow()
			if err != nil {
				b.Error(err)
			}
			done(nil)
		}
	})
}

// One failure and the success that ends the run: two swaps of the word.
func BenchmarkFailureSuccess(b *testing.B) {
	g := newGate(b, Config{}, nil)
	failed := errors.New("refused")
	b.ReportAllocs()
	for b.Loop() {
		t, _ := g.Allow()
		g.Failure(t, failed)
		t, _ = g.Allow()
		g.Success(t)
	}
}

// What a refusal costs, which is all there is while every instance is open.
func BenchmarkOpen(b *testing.B) {
	g := newGate(b, Config{Failures: 1, OpenFor: time.Hour}, nil)
	t, _ := g.Allow()
	g.Failure(t, nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := g.Allow(); ok {
			b.Fatal("admitted")
		}
	}
}

// What a request pays to learn that there is no probe to take.
func BenchmarkFreeProbes(b *testing.B) {
	g := newGate(b, Config{}, nil)
	b.ReportAllocs()
	for b.Loop() {
		if g.FreeProbes() != 0 {
			b.Fatal("free probe of a closed gate")
		}
	}
}

// BenchmarkInit is what a breaker costs that never opens: most of them.
func BenchmarkInit(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if err := new(Gate).Init(Config{}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
