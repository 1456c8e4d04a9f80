package testbed

import (
	"errors"
	"sync"

	"golang.org/x/sync/errgroup"
)

// collector runs functions at the same time and keeps all of their errors, where an
// errgroup keeps the first: what cleans up goes on.
type collector struct {
	group errgroup.Group
	limit sync.Once
	mu    sync.Mutex
	errs  []error
}

func (c *collector) add(err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errs = append(c.errs, err)
}

func (c *collector) run(fn func() error) {
	c.limit.Do(func() { c.group.SetLimit(parallel) })
	c.group.Go(func() error {
		c.add(fn())
		return nil
	})
}

func (c *collector) wait() error {
	_ = c.group.Wait()
	return errors.Join(c.errs...)
}
