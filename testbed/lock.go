package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockRetry is how often a lock that somebody holds is tried again.
const lockRetry = 20 * time.Millisecond

// fileLock is an flock; the kernel drops it when its holder dies.
type fileLock struct{ f *os.File }

func (l *fileLock) unlock() {
	if l != nil {
		l.f.Close()
	}
}

// lockFile takes an flock on path, creating the file if it is missing; how is unix.LOCK_EX or
// unix.LOCK_SH. It waits until ctx ends. Should the file be removed while we wait, the error is os.ErrNotExist.
func lockFile(ctx context.Context, path string, how int) (*fileLock, error) {
	return lock(ctx, path, os.O_RDWR|os.O_CREATE, how)
}

// lockDir is lockFile for a directory; it makes none.
func lockDir(ctx context.Context, path string, how int) (*fileLock, error) {
	return lock(ctx, path, os.O_RDONLY|unix.O_DIRECTORY, how)
}

func lock(ctx context.Context, path string, flags, how int) (*fileLock, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			if !sameFile(f, path) {
				f.Close()
				return nil, &os.PathError{Op: "lock", Path: path, Err: os.ErrNotExist}
			}
			return &fileLock{f}, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another command that works on %s: %w", path, ctx.Err())
		case <-time.After(lockRetry):
		}
	}
}

// sameFile tells whether path still names the file that f is open on.
func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// operate locks the bed's directory for one operation: exclusive for those that
// make or remove the bed, shared for those that work within it. Without a directory the error is os.ErrNotExist.
func (l layout) operate(ctx context.Context, exclusive bool) (*fileLock, error) {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	return lockDir(ctx, l.dir, how)
}
