package agent

import (
	"errors"
	"fmt"
	"net/http"

	"causeway/kvstore"
)

// failureOf is an error that says what kind of answer it is to the one who asked.
type failureOf struct {
	status int
	err    error
}

func (f *failureOf) Error() string { return f.err.Error() }
func (f *failureOf) Unwrap() error { return f.err }

// invalid says that what was asked cannot be meant; nothing was changed.
func invalid(format string, args ...any) error {
	return &failureOf{http.StatusBadRequest, fmt.Errorf(format, args...)}
}

// missing says that what was asked for is not there.
func missing(format string, args ...any) error {
	return &failureOf{http.StatusNotFound, fmt.Errorf(format, args...)}
}

// conflict says that what is there stands against what was asked.
func conflict(format string, args ...any) error {
	return &failureOf{http.StatusConflict, fmt.Errorf(format, args...)}
}

// httpStatus of an error.
func httpStatus(err error) int {
	var f *failureOf
	switch {
	case errors.As(err, &f):
		return f.status
	case errors.Is(err, kvstore.ErrUnavailable):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
