package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"causeway/agent/api"
)

// waitPause is how long status --wait waits before it asks again.
const waitPause = 250 * time.Millisecond

// waitWell asks until the node is well and every peer connected, and returns what it was told last. When the time is up that is no
// error here; lacks says of the status what is not well.
func (e *env) waitWell(ctx context.Context, c *api.Client, wait time.Duration) (*api.Status, error) {
	began := time.Now()
	bounded, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var last *api.Status
	lastErr := fmt.Errorf("the agent at %s did not answer within %s", c.Socket(), duration(wait))
	told := ""
	for {
		s, err := c.Status(bounded)
		if bounded.Err() != nil {
			break
		}
		last, lastErr = s, err
		lacking := ""
		switch {
		case hopeless(err):
			return nil, err
		case err != nil:
			lacking = err.Error()
		default:
			if lacking = strings.Join(lacks(s), "; "); lacking == "" {
				return s, nil
			}
		}
		if e.terminalErr && lacking != told {
			told = lacking
			fmt.Fprintf(e.err, "%6.1fs  not well yet: %s\n", time.Since(began).Seconds(), printable(lacking))
		}
		select {
		case <-bounded.Done():
		case <-time.After(waitPause):
		}
	}
	if ctx.Err() != nil {
		return nil, &exitError{exitInterrupted, errors.New("interrupted while waiting")}
	}
	if lastErr != nil {
		return nil, lastErr
	}
	return last, nil
}

// hopeless tells whether asking again would bring the same.
func hopeless(err error) bool {
	var refused *api.Error
	return errors.As(err, &refused) || errors.Is(err, syscall.EACCES)
}

// lacks says what is not well yet: the node's problems, and peers that are not connected. One that has left is not waited for.
func lacks(s *api.Status) []string {
	var lacking []string
	if !s.OK {
		lacking = slices.Clone(s.Problems)
		if len(lacking) == 0 {
			lacking = []string{"the node has problems"}
		}
	}
	for _, p := range s.Peers {
		named := slices.ContainsFunc(lacking, func(text string) bool { return strings.Contains(text, p.Name) })
		if p.State == peerConnected || p.State == peerLeft || named {
			continue
		}
		text := fmt.Sprintf("peer %s is %s", p.Name, p.State)
		if len(p.Why) > 0 {
			text += ": " + p.Why[0]
		}
		lacking = append(lacking, text)
	}
	return lacking
}
