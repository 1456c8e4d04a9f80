package kvstore

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// requestError explains a failed request in terms of the Store's contract: what was tried, on
// which key, at which endpoint, and why it failed.
func (e *etcd) requestError(what, key string, err error) error {
	where := fmt.Sprintf("kvstore: %s %q at %s", what, key, e.where)
	switch {
	case errors.Is(err, ErrConflict), errors.Is(err, ErrNotFound):
		return fmt.Errorf("%s: %w", where, err)
	case e.ctx.Err() != nil:
		return fmt.Errorf("%s: %w", where, ErrClosed)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", where, err)
	case !unavailable(err):
		return fmt.Errorf("%s: %w", where, err)
	}
	if why := e.contact.lastError(); why != "" {
		return fmt.Errorf("%s: %w: %w (%s)", where, ErrUnavailable, err, why)
	}
	return fmt.Errorf("%s: %w: %w", where, ErrUnavailable, err)
}

// unavailable tells whether err means that the server was not there, not there in time, or not able to serve.
func unavailable(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	switch errorCode(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	}
	return false
}

// errorCode returns the gRPC code of err, which may be a gRPC status or one of etcd's own errors.
func errorCode(err error) codes.Code {
	var coded interface{ Code() codes.Code }
	if errors.As(err, &coded) {
		return coded.Code()
	}
	return status.Code(err)
}
