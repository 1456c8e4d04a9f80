package peering

import (
	"errors"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
)

func TestRenew(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	before, theirs := east.peer("west"), west.peer("east")
	cert := func(p Peer) string { return mustCert(t, p.Cert).Subject.CommonName }

	east.renewDue(t.Context())
	if east.peer("west").Cert != before.Cert {
		t.Error("renewed what is not due")
	}
	// Two thirds of its life are over.
	later := 65 * 24 * time.Hour
	east.clock.set(later)
	west.clock.set(later)
	east.renewDue(t.Context())
	after := east.peer("west")
	if after.Cert == before.Cert || after.Key == before.Key || cert(after) != cert(before) {
		t.Errorf("renewed for user %s, key or certificate is the same", cert(after))
	}
	if until := mustCert(t, after.Cert).NotAfter; !until.After(time.Now().Add(later)) {
		t.Errorf("it ends at %s", until)
	}
	if p := west.peer("east"); !p.UserExpires.After(theirs.UserExpires) || p.User != theirs.User {
		t.Errorf("west's record says %s until %s", p.User, p.UserExpires)
	}
	_, err := east.Ask(t.Context(), after)
	must(t, err)
	if problems := east.Problems(); len(problems) != 0 {
		t.Errorf("problems %q", problems)
	}

	west.stop()
	wantError(t, east.Renew(t.Context(), "west"), "cannot be reached")
	if problems := east.Problems(); len(problems) != 1 || !strings.HasPrefix(problems[0], "peer west: ") {
		t.Errorf("problems %q", problems)
	}
	wantError(t, east.Renew(t.Context(), "north"), "there is no peer north")
	west.comeBack()
	must(t, east.Renew(t.Context(), "west"))
	if problems := east.Problems(); len(problems) != 1 { // north's
		t.Errorf("problems %q", problems)
	}
}

// TestExpiredCertificate: it opens nothing any more, and the clusters can be connected anew.
func TestExpiredCertificate(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	east.clock.set(91 * 24 * time.Hour)
	west.clock.set(91 * 24 * time.Hour)
	_, err := east.Ask(t.Context(), east.peer("west"))
	wantError(t, err, "expired")
	east.mustConnect(west)
	_, err = east.Ask(t.Context(), east.peer("west"))
	must(t, err)
	if len(west.readers()) != 1 || len(east.readers()) != 1 {
		t.Errorf("users %q and %q", west.readers(), east.readers())
	}
}

// TestServingCertificate is renewed by itself, and made anew when the authority is another.
func TestServingCertificate(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	first := west.ServingCert()
	west.clock.set(20 * time.Hour)
	east.clock.set(20 * time.Hour)
	_, err := east.Ask(t.Context(), east.peer("west"))
	must(t, err)
	if west.ServingCert().Equal(first) {
		t.Error("served with a certificate that is due")
	}
	authority := mustGet[*pki.Authority](t)(pki.NewAuthority("west", west.Now()))
	must(t, west.Store.Put(t.Context(), AuthorityKey, EncodeAuthority(authority)))
	eventually(t, "the new authority is in use", func() bool {
		got, err := west.Authority(t.Context())
		return err == nil && got.Fingerprint() == authority.Fingerprint()
	})
	_, err = east.Ask(t.Context(), east.peer("west"))
	wantError(t, err, "has fingerprint "+authority.Fingerprint().String(), "the record names ", "cluster west has got a new authority since")
	if errors.Is(err, ErrLeft) {
		t.Error("taken for a peer that has left")
	}
}

// TestRenewedIsChecked: what a peer sends instead of the certificate that was asked for does not get into the record.
func TestRenewedIsChecked(t *testing.T) {
	authority := mustGet[*pki.Authority](t)(pki.NewAuthority("west", time.Now()))
	issue := func(by *pki.Authority, user string) pki.Pair {
		return mustGet[pki.Pair](t)(by.Issue(pki.Request{User: user}, time.Now()))
	}
	const user = "peer-east-aaaaaaaa"
	first, good := issue(authority, user), issue(authority, user)
	p := Peer{Authority: string(authority.CertPEM()), Cert: string(first.Cert), Key: string(first.Key)}
	_, err := p.renewed(good.Cert, good.Key, "east", time.Now())
	must(t, err)
	stranger := mustGet[*pki.Authority](t)(pki.NewAuthority("west", time.Now()))
	for want, cert := range map[string][]byte{
		"instead of " + user:          issue(authority, "peer-east-bbbbbbbb").Cert,
		"no user of cluster east":     issue(authority, "peer-north-aaaaaaaa").Cert,
		"not signed by the authority": issue(stranger, user).Cert,
		"does not match":              first.Cert,
		"certificate":                 nil,
	} {
		_, err := p.renewed(cert, good.Key, "east", time.Now())
		wantError(t, err, want)
	}
}
