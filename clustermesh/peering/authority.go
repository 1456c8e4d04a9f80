package peering

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// rootValidity is how long a certificate of the user root holds. It is made when it is needed, and kept nowhere.
const rootValidity = 10 * time.Minute

// storedAuthority is the value of AuthorityKey: PEM.
type storedAuthority struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// EncodeAuthority returns the stored form of an authority. It holds the private key.
func EncodeAuthority(a *pki.Authority) []byte {
	value, err := json.Marshal(storedAuthority{string(a.CertPEM()), string(a.KeyPEM())})
	if err != nil {
		panic(err) // two strings
	}
	return value
}

// DecodeAuthority reads an authority from its stored form.
func DecodeAuthority(value []byte) (*pki.Authority, error) {
	var stored storedAuthority
	// json's errors quote what is wrong, which could be a part of the key.
	if json.Unmarshal(value, &stored) != nil {
		return nil, fmt.Errorf("%s: not a JSON object with a certificate and a key", AuthorityKey)
	}
	a, err := pki.ParseAuthority([]byte(stored.Cert), []byte(stored.Key))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", AuthorityKey, err)
	}
	return a, nil
}

// ErrOtherAuthority says that a store belongs to another authority than the one that it was to be given.
var ErrOtherAuthority = errors.New("the store has another certificate authority")

// StoreAuthority puts the cluster's authority into its store, for the cluster's agents to sign with. It does nothing if it is
// there already, and returns ErrOtherAuthority if another one is.
func StoreAuthority(ctx context.Context, store kvstore.Store, a *pki.Authority) error {
	stored, err := checkAuthority(ctx, store, a)
	if err != nil || stored {
		return err
	}
	err = store.Create(ctx, AuthorityKey, EncodeAuthority(a))
	if errors.Is(err, kvstore.ErrConflict) { // somebody else was faster
		_, err = checkAuthority(ctx, store, a)
	}
	return err
}

// checkAuthority tells whether the store has the authority; ErrOtherAuthority says that it has another one.
func checkAuthority(ctx context.Context, store kvstore.Store, a *pki.Authority) (stored bool, err error) {
	entry, err := store.Get(ctx, AuthorityKey)
	switch {
	case errors.Is(err, kvstore.ErrNotFound):
		return false, nil
	case err != nil:
		return false, err
	}
	has, err := DecodeAuthority(entry.Value)
	if err != nil {
		return false, fmt.Errorf("the authority in the store cannot be read: %w", err)
	}
	if has.Fingerprint() != a.Fingerprint() {
		return false, fmt.Errorf("%w: %.16s… and not %.16s…, which the files have. If the store is right, bring the files of its authority back. "+
			"If the files are right, delete the key %s with etcdctl and a certificate of the user %s; all peers have to be connected anew then",
			ErrOtherAuthority, has.Fingerprint(), a.Fingerprint(), AuthorityKey, pki.UserRoot)
	}
	return true, nil
}

// RootConfig is how to reach a cluster's store as its administrator, with a certificate that the cluster's authority signs just for that.
func RootConfig(endpoints []string, a *pki.Authority, now time.Time) (kvstore.Config, error) {
	pair, err := a.Issue(pki.Request{User: pki.UserRoot, Validity: rootValidity}, now)
	if err != nil {
		return kvstore.Config{}, err
	}
	cert, err := pair.TLS()
	if err != nil {
		return kvstore.Config{}, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.Cert)
	return kvstore.Config{
		Endpoints: endpoints,
		TLS:       &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
	}, nil
}

// PrepareStore makes a store ready for the cluster of an authority, as root: only who has a user may do anything from then on, the cluster's agents have
// one, and the authority is there for them. It may be done again at any time. A store of another authority is left as it is.
func PrepareStore(ctx context.Context, root kvstore.Config, a *pki.Authority) (err error) {
	// First, since it fails at once, and with the reason, if the store is not there.
	access, err := kvstore.OpenAccess(ctx, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, access.Close()) }()
	store, err := kvstore.Dial(ctx, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if _, err := checkAuthority(ctx, store, a); err != nil {
		return err
	}
	// Before that everybody with a certificate could read the key.
	if err := access.Prepare(ctx, pki.UserAgent); err != nil {
		return err
	}
	return StoreAuthority(ctx, store, a)
}
