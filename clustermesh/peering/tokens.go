package peering

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"causeway/kvstore"
	"causeway/lb"
)

const (
	minTTL = 10 * time.Second
	maxTTL = 24 * time.Hour
	// introductionTTL of tokens that are made for one cluster and handed over by a program.
	introductionTTL = 5 * time.Minute
	// rememberTokens that were used or have expired, so that who comes late is told why.
	rememberTokens = time.Hour
	// maxTokens that are remembered.
	maxTokens = 256
)

// TokenOptions of CreateToken.
type TokenOptions struct {
	TTL time.Duration // DefaultTTL if 0; 10 s to 24 h
	// Isolated: who joins with it is not introduced to this cluster's peers.
	Isolated bool
}

// CreateToken makes a token, which one cluster can join with, once.
func (s *Service) CreateToken(ctx context.Context, o TokenOptions) (Token, error) {
	if o.TTL == 0 {
		o.TTL = DefaultTTL
	}
	if o.TTL < minTTL || o.TTL > maxTTL {
		return Token{}, fmt.Errorf("a token for %s: choose a time from %s to %s", o.TTL, minTTL, maxTTL)
	}
	return s.makeToken(ctx, o, "")
}

// makeToken makes a token for one cluster only, or for any if that is empty.
func (s *Service) makeToken(ctx context.Context, o TokenOptions, only string) (Token, error) {
	authority, err := s.Authority(ctx)
	if err != nil {
		return Token{}, err
	}
	if err := s.forgetTokens(ctx); err != nil {
		return Token{}, err
	}
	t, now := newToken(), s.Now()
	t.Mesh, t.Cluster, t.Authority = s.Mesh, s.Self.Cluster, authority.Fingerprint()
	t.Expires = now.Add(o.TTL).Truncate(time.Second).UTC()
	t.Endpoints = s.ownEndpoints()
	if _, err := ParseToken(t.String()); err != nil {
		return Token{}, fmt.Errorf("make a token: %w: set peering.endpoints to where other clusters reach this one", err)
	}
	record := recordOf(t)
	record.Created, record.Node, record.Isolated, record.For = now.UTC(), s.Self.Node, o.Isolated, only
	if err := s.Store.Create(ctx, tokenKey(t.ID), encodeTokenRecord(record)); err != nil {
		return Token{}, fmt.Errorf("write the token's record: %w", err)
	}
	s.Log.Info("Made a token", "token", t, "expires", t.Expires, "for", only)
	return t, nil
}

// ownEndpoints are where others reach this cluster's API, as many as fit.
func (s *Service) ownEndpoints() []string {
	endpoints := slices.Clone(s.Endpoints())
	return endpoints[:min(len(endpoints), maxEndpoints)]
}

// forgetTokens deletes those that nobody will ask for any more.
func (s *Service) forgetTokens(ctx context.Context) error {
	entries, err := s.Store.List(ctx, tokensPrefix)
	if err != nil {
		return fmt.Errorf("list the tokens: %w", err)
	}
	left := 0
	for _, e := range entries {
		r, err := decodeTokenRecord(e.Key, e.Value)
		if err == nil && s.Now().Before(r.forgotten()) {
			left++
			continue
		}
		if err != nil {
			s.Log.Warn("Deleted a token's record that cannot be read", "key", e.Key, "error", err)
		}
		if err := s.Store.Delete(ctx, e.Key); err != nil {
			return fmt.Errorf("delete an old token: %w", err)
		}
	}
	if left >= maxTokens {
		return fmt.Errorf("there are %d tokens already: delete some with clustermesh token delete, or wait until they expire", left)
	}
	return nil
}

// forgetUsedBy deletes the records of tokens that a cluster has used before its newest one: who joins again and again leaves no more than one. That
// it fails changes nothing but that.
func (s *Service) forgetUsedBy(ctx context.Context, cluster, newest string) {
	records, err := s.Tokens(ctx)
	for _, r := range records {
		if err == nil && r.UsedBy == cluster && r.ID != newest {
			err = s.Store.Delete(ctx, tokenKey(r.ID))
		}
	}
	if err != nil {
		s.Log.Debug("Records of old tokens stay until they expire", "cluster", cluster, "error", err)
	}
}

// forgotten is when nothing has to be known of it any more.
func (r TokenRecord) forgotten() time.Time {
	if !r.UsedAt.IsZero() {
		return r.UsedAt.Add(rememberTokens)
	}
	return r.Expires.Add(rememberTokens)
}

// Tokens lists the tokens that were made and have not been forgotten yet: a used or expired one is for a while.
func (s *Service) Tokens(ctx context.Context) (records []TokenRecord, err error) {
	entries, err := s.Store.List(ctx, tokensPrefix)
	if err != nil {
		return nil, fmt.Errorf("list the tokens: %w", err)
	}
	for _, e := range entries {
		r, err := decodeTokenRecord(e.Key, e.Value)
		if err != nil {
			s.Log.Warn("A token's record cannot be read", "key", e.Key, "error", err)
			continue
		}
		if s.Now().Before(r.forgotten()) {
			records = append(records, r)
		}
	}
	slices.SortFunc(records, func(a, b TokenRecord) int { return a.Created.Compare(b.Created) })
	return records, nil
}

// DeleteToken makes a token worthless.
func (s *Service) DeleteToken(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	_, err := s.Store.Get(ctx, tokenKey(id))
	if errors.Is(err, kvstore.ErrNotFound) {
		return fmt.Errorf("there is no token %s: clustermesh token list shows those that there are", id)
	}
	if err == nil {
		err = s.Store.Delete(ctx, tokenKey(id))
	}
	if err != nil {
		return fmt.Errorf("delete token %s: %w", id, err)
	}
	return nil
}

// presented is a token's record, as somebody has shown the token.
type presented struct {
	TokenRecord
	revision int64
}

// present checks a token that somebody shows. Its error is the request's.
func (s *Service) present(ctx context.Context, c *Credential, cluster string) (presented, error) {
	source := sourceOf(remoteAddr(ctx))
	if err := s.attempts.allowed(source, s.Now()); err != nil {
		// Not logged: each of those before was, and there is no end to these.
		return presented{}, refuse(codes.ResourceExhausted, Refusal_TOKEN, "%s", err)
	}
	p, wrong, err := s.findToken(ctx, c)
	if err != nil {
		return presented{}, s.ownStoreFailed(err)
	}
	if wrong == "" && p.For != "" && p.For != cluster {
		wrong = fmt.Sprintf("the token is for cluster %s alone", p.For)
	}
	if wrong == "" {
		return p, nil
	}
	s.attempts.fail(source, s.Now())
	s.Log.Warn("Refused a token", "id", plain(c.GetId()), "from", source, "why", wrong)
	return presented{}, refuse(codes.PermissionDenied, Refusal_TOKEN, "%s", wrong)
}

// findToken returns the record of a token, or what is wrong with it. The error is the own store's.
func (s *Service) findToken(ctx context.Context, c *Credential) (p presented, wrong string, err error) {
	const unknown = "the token is not known here: it was deleted, or another cluster has made it; create a new one"
	if checkID(c.GetId()) != nil || len(c.GetSecret()) != secretSize {
		return p, unknown, nil
	}
	entry, err := s.Store.Get(ctx, tokenKey(c.GetId()))
	if errors.Is(err, kvstore.ErrNotFound) {
		return p, unknown, nil
	}
	if err != nil {
		return p, "", err
	}
	r, err := decodeTokenRecord(entry.Key, entry.Value)
	if err != nil {
		return p, "", err
	}
	sum := sha256.Sum256(c.GetSecret())
	switch now := s.Now(); {
	case subtle.ConstantTimeCompare(sum[:], r.Secret) != 1:
		return p, unknown, nil // who guesses IDs must not learn that he has found one
	case r.UsedBy != "":
		return p, fmt.Sprintf("the token was used by cluster %s at %s: it works only once, so create a new one", r.UsedBy, stamp(r.UsedAt)), nil
	case !now.Before(r.Expires):
		return p, fmt.Sprintf("the token has expired %s ago, at %s: create a new one", now.Sub(r.Expires).Round(time.Second), stamp(r.Expires)), nil
	}
	return presented{r, entry.Revision}, "", nil
}

// usedBy returns the write that makes a token used.
func (p presented) usedBy(cluster string, now time.Time) (kvstore.Condition, kvstore.Op) {
	p.UsedBy, p.UsedAt = cluster, now
	key := tokenKey(p.ID)
	return kvstore.Condition{Key: key, Revision: p.revision}, kvstore.Op{Kind: kvstore.OpPut, Key: key, Value: encodeTokenRecord(p.TokenRecord)}
}

// checkClusterName is for names that came from elsewhere and become part of a key.
func checkClusterName(name string) error { return lb.CheckName("cluster", name) }
