package kvstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
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
	case denied(err):
		return fmt.Errorf("%s: %w: %w", where, ErrDenied, err)
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

// denied tells whether err means that the store does not let us do that, be it for want of a user or of a right.
func denied(err error) bool {
	if err == nil {
		return false
	}
	switch errorCode(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return true
	}
	if errors.Is(err, ErrDenied) {
		return true
	}
	for _, is := range []error{rpctypes.ErrUserEmpty, rpctypes.ErrUserNotFound, rpctypes.ErrAuthFailed} {
		if errors.Is(rpctypes.Error(err), is) {
			return true
		}
	}
	// A watch is told so in words alone.
	return strings.Contains(err.Error(), rpctypes.ErrPermissionDenied.Error())
}

// withNewestUsers makes a request, anew as long as etcd only says that users or roles have changed while it was under way. Nothing was done then.
func withNewestUsers[T any](ctx context.Context, request func() (T, error)) (T, error) {
	for {
		answer, err := request()
		if !errors.Is(rpctypes.Error(err), rpctypes.ErrAuthOldRevision) || !sleep(ctx, time.Millisecond) {
			return answer, err
		}
	}
}
