package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// contextOfSignals returns a context that ends when somebody wants this process to end: by a signal, by closing its
// terminal, or by no longer reading its output ("demo | head"). Commands then put things back in
// order before they return, so a second signal changes nothing.
func contextOfSignals() context.Context {
	var signals []os.Signal
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // as under nohup
			signals = append(signals, s)
		}
	}
	ctx, _ := signal.NotifyContext(context.Background(), signals...)
	ctx, cancel := context.WithCancel(ctx)
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	go func() { // for as long as the process lives
		for range broken {
			if hasNoReader(os.Stdout) || hasNoReader(os.Stderr) {
				cancel()
			}
		}
	}()
	return ctx
}

// hasNoReader tells whether f is a pipe that nobody reads: SIGPIPE doesn't say which file it is
// about, and for a network connection it means nothing.
func hasNoReader(f *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(f.Fd())}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0
}
