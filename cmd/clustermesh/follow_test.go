package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"testing"
	"testing/synctest"
	"time"
)

func TestFollowTellsWhenNothingComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var account []string
		err := follow(t.Context(), func(context.Context) iter.Seq2[int, error] {
			return func(yield func(int, error) bool) {
				for i, after := range []time.Duration{900 * time.Millisecond, 900 * time.Millisecond, 6500 * time.Millisecond} {
					time.Sleep(after)
					if !yield(i, nil) {
						return
					}
				}
			}
		}, func(i int) error {
			account = append(account, fmt.Sprint(i))
			return nil
		}, func(since time.Duration) { account = append(account, since.String()) })
		// Twice something came in time; then a second was long, and five more after that.
		if want := "[0 1 2.8s 7.8s 2]"; err != nil || fmt.Sprint(account) != want {
			t.Errorf("got %v, %v, want %s", account, err, want)
		}
	})
}

func TestFollowEndsItsStream(t *testing.T) {
	failed := errors.New("failed")
	endless := func(ended chan<- struct{}) func(context.Context) iter.Seq2[int, error] {
		return func(ctx context.Context) iter.Seq2[int, error] {
			return func(yield func(int, error) bool) {
				defer close(ended)
				for yield(0, nil) {
				}
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	for want, got := range map[error]func(int) error{
		failed:           func(int) error { return failed },
		context.Canceled: func(int) error { cancel(); return nil },
	} {
		ended := make(chan struct{})
		if err := follow(ctx, endless(ended), got, func(time.Duration) {}); !errors.Is(err, want) && !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, want)
		}
		<-ended
	}
	err := follow(t.Context(), func(context.Context) iter.Seq2[int, error] {
		return func(yield func(int, error) bool) { yield(0, failed) }
	}, func(int) error { return nil }, func(time.Duration) {})
	if !errors.Is(err, failed) {
		t.Errorf("got %v", err)
	}
}
