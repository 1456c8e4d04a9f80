package peering

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

const (
	// renewEvery is how often is looked whether certificates are due, plus up to as much again, so that the nodes of a cluster don't
	// all do it at once. A month of life is left then.
	renewEvery = time.Hour
	// renewSoon is when it is looked for the first time.
	renewSoon = time.Minute
)

// renewals remembers what went wrong.
type renewals struct {
	mu       sync.Mutex
	problems map[string]string // by the peer
}

func (r *renewals) set(peer string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problems == nil {
		r.problems = map[string]string{}
	}
	delete(r.problems, peer)
	if err != nil {
		r.problems[peer] = err.Error()
	}
}

// Problems with renewing this cluster's certificates at its peers, a sentence for each peer.
func (s *Service) Problems() (all []string) {
	s.renewals.mu.Lock()
	defer s.renewals.mu.Unlock()
	for _, peer := range slices.Sorted(maps.Keys(s.renewals.problems)) {
		all = append(all, fmt.Sprintf("peer %s: %s", peer, s.renewals.problems[peer]))
	}
	return all
}

// renewAll renews what is due, until ctx ends. Every agent does it; the first one's write is what counts.
func (s *Service) renewAll(ctx context.Context) error {
	next := time.NewTimer(renewSoon/2 + rand.N(renewSoon))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
		}
		s.renewDue(ctx)
		next.Reset(renewEvery + rand.N(renewEvery))
	}
}

// renewDue renews the certificates that are due now.
func (s *Service) renewDue(ctx context.Context) {
	entries, err := s.Store.List(ctx, PeersPrefix)
	if err != nil {
		return // the store's own status says so
	}
	for _, e := range entries {
		p, err := DecodePeer(e.Key, e.Value)
		if err != nil || p.State == Left {
			continue // who watches the records tells
		}
		if cert, err := pki.ParseCert([]byte(p.Cert)); err == nil && pki.Due(cert, s.Now()) {
			if err := s.Renew(ctx, p.Name()); err != nil {
				s.Log.Warn("Could not renew this cluster's certificate at a peer", "peer", p.Name(), "until", cert.NotAfter, "error", err)
			}
		}
	}
}

// Renew has a peer sign a new certificate for this cluster, and puts it into the record.
func (s *Service) Renew(ctx context.Context, name string) error {
	err := s.renew(ctx, name)
	s.renewals.set(name, err)
	return err
}

func (s *Service) renew(ctx context.Context, name string) error {
	if err := checkClusterName(name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	p, found, err := s.record(ctx, name)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("there is no peer %s: clustermesh peers shows those that there are", name)
	}
	request, key, err := pki.NewRequest()
	if err != nil {
		return err
	}
	var answer *RenewResponse
	err = s.ask(ctx, p.Peer, func(l *link) (err error) {
		answer, err = l.Renew(ctx, &RenewRequest{Request: request})
		return err
	})
	if err != nil {
		return err
	}
	pair, err := p.renewed(answer.GetCertificate(), key, s.Self.Cluster, s.Now())
	if err != nil {
		return fmt.Errorf("the new certificate of cluster %s is refused: %w", name, err)
	}
	p.Cert, p.Key = string(pair.Cert), string(pair.Key)
	if err := s.swap(ctx, p); errors.Is(err, kvstore.ErrConflict) {
		return s.renewedByOther(ctx, p)
	} else if err != nil {
		return err
	}
	s.Log.Info("Renewed this cluster's certificate at a peer", "peer", name)
	return nil
}

// renewed checks a new certificate: it must be for the same user, since that is what the peer's store knows.
func (p *Peer) renewed(cert, key []byte, cluster string, now time.Time) (pki.Pair, error) {
	authority, err := parseAuthority([]byte(p.Authority))
	if err != nil {
		return pki.Pair{}, err
	}
	leaf, err := checkSigned(cert, authority, cluster, now)
	if err != nil {
		return pki.Pair{}, err
	}
	last, err := pki.ParseCert([]byte(p.Cert))
	if err != nil {
		return pki.Pair{}, err
	}
	if leaf.Subject.CommonName != last.Subject.CommonName {
		return pki.Pair{}, fmt.Errorf("it is for user %s instead of %s", leaf.Subject.CommonName, last.Subject.CommonName)
	}
	pair := pki.Pair{Cert: certPEM(leaf.Raw), Key: key}
	_, err = pair.TLS()
	return pair, err
}

// renewedByOther accepts that another agent was quicker, or that the peer has had its own renewed meanwhile.
func (s *Service) renewedByOther(ctx context.Context, tried stored) error {
	now, found, err := s.record(ctx, tried.Name())
	if err != nil || !found || now.User != tried.User {
		return err
	}
	last, err := pki.ParseCert([]byte(now.Cert))
	if err != nil {
		return err
	}
	if !pki.Due(last, s.Now()) {
		return nil
	}
	now.Cert, now.Key = tried.Cert, tried.Key
	return s.swap(ctx, now)
}
