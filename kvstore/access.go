package kvstore

import (
	"context"
	"errors"
)

// Access administers who may do what in a store, by etcd's users and roles. A user is the common name of a client's
// certificate. It needs a certificate of the user root.
type Access struct{}

// OpenAccess connects as root. Unlike Dial it fails if the store does not answer.
func OpenAccess(ctx context.Context, cfg Config) (*Access, error) {
	return nil, errors.New("not implemented")
}

// Prepare makes the users root and agent, agent with the right to read and write what is Causeway's, and has the
// store refuse everybody without a user. It may be done again at any time.
func (a *Access) Prepare(ctx context.Context, agent string) error {
	return errors.New("not implemented")
}

// GrantRead makes a user that may read what is under prefix, and do nothing else. One that exists is made so.
func (a *Access) GrantRead(ctx context.Context, user, prefix string) error {
	return errors.New("not implemented")
}

// Revoke removes a user and its role, at once also from watches that it has open on our own server. One that does not exist is no error.
func (a *Access) Revoke(ctx context.Context, user string) error { return errors.New("not implemented") }

// Readers lists the users that GrantRead has made.
func (a *Access) Readers(ctx context.Context) ([]string, error) {
	return nil, errors.New("not implemented")
}

// Close ends the connection.
func (a *Access) Close() error { return nil }
