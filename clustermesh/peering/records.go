package peering

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
	"causeway/lb"
)

// Keys of the records, all for the cluster's own agents alone.
const (
	AuthorityKey = kvstore.PrivatePrefix + "ca"
	RingKey      = kvstore.PrivatePrefix + "gossip"
	tokensPrefix = kvstore.PrivatePrefix + "tokens/"
	PeersPrefix  = kvstore.PrivatePrefix + "peers/"
)

// PeerKey is where the record of a peer is.
func PeerKey(cluster string) string { return PeersPrefix + cluster }

// EncodePeer returns the stored form of a record.
func EncodePeer(p Peer) []byte {
	p.Since, p.UserExpires = p.Since.UTC(), p.UserExpires.UTC()
	return encode(p)
}

// DecodePeer reads a record, and refuses what does not fit its key.
func DecodePeer(key string, value []byte) (Peer, error) {
	var p Peer
	name, ok := strings.CutPrefix(key, PeersPrefix)
	if !ok {
		return Peer{}, fmt.Errorf("peer record: key %.100q does not begin with %s", key, PeersPrefix)
	}
	err := lb.Unmarshal(value, &p)
	if err == nil {
		err = checkPeer(p)
	}
	if err == nil && p.Name() != name {
		err = fmt.Errorf("value is of cluster %s, but the key of another", p.Name())
	}
	if err != nil {
		return Peer{}, fmt.Errorf("peer record %.100q: %w", name, err)
	}
	return p, nil
}

func checkPeer(p Peer) error {
	if err := identity.CheckCluster(p.Cluster); err != nil {
		return err
	}
	switch p.State {
	case Joining, Connected, Left:
	default:
		return fmt.Errorf("state %.40q is none of joining, connected and left", p.State)
	}
	if err := checkStoreEndpoints(p.StoreEndpoints); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := checkEndpoints(p.Endpoints); err != nil {
		return fmt.Errorf("API: %w", err)
	}
	if _, err := pki.ParseCert([]byte(p.Authority)); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if _, err := (pki.Pair{Cert: []byte(p.Cert), Key: []byte(p.Key)}).TLS(); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if cluster, ok := pki.ClusterOf(p.User); !ok || cluster != p.Name() {
		return fmt.Errorf("user %.100q is not one of cluster %s", p.User, p.Name())
	}
	if p.Since.IsZero() || p.UserExpires.IsZero() {
		return errors.New("since or userExpires is missing")
	}
	return nil
}

// checkStoreEndpoints refuses what is not etcd's with TLS.
func checkStoreEndpoints(endpoints []string) error {
	hosts := make([]string, len(endpoints))
	for i, endpoint := range endpoints {
		hosts[i] = strings.TrimPrefix(endpoint, "https://")
	}
	return checkEndpoints(hosts)
}

// TokenRecord is what is kept of a token: nothing that could be used instead of it.
type TokenRecord struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Node that made it.
	Node string `json:"node"`
	// Secret is the SHA-256 of the token's.
	Secret   []byte `json:"secret"`
	Isolated bool   `json:"isolated,omitempty"`
	// For is the only cluster that may use it, by name, if it was made to introduce one.
	For    string    `json:"for,omitempty"`
	UsedBy string    `json:"usedBy,omitempty"`
	UsedAt time.Time `json:"usedAt,omitzero"`
}

// recordOf returns what is kept of a token.
func recordOf(t Token) TokenRecord {
	sum := sha256.Sum256(t.Secret)
	return TokenRecord{ID: t.ID, Expires: t.Expires, Secret: sum[:]}
}

func tokenKey(id string) string { return tokensPrefix + id }

func encodeTokenRecord(r TokenRecord) []byte {
	r.Created, r.Expires, r.UsedAt = r.Created.UTC(), r.Expires.UTC(), r.UsedAt.UTC()
	return encode(r)
}

func decodeTokenRecord(key string, value []byte) (TokenRecord, error) {
	var r TokenRecord
	err := lb.Unmarshal(value, &r)
	switch {
	case err != nil:
	case key != tokenKey(r.ID) || checkID(r.ID) != nil:
		err = errors.New("value is of another token than the key")
	case len(r.Secret) != sha256.Size:
		err = errors.New("the secret's hash is not SHA-256")
	}
	if err != nil {
		return TokenRecord{}, fmt.Errorf("token record %.100q: %w", strings.TrimPrefix(key, tokensPrefix), err)
	}
	return r, nil
}

// encode marshals rows of strings, numbers and times of this millennium, which cannot fail.
func encode(row any) []byte {
	value, err := json.Marshal(row)
	if err != nil {
		panic(fmt.Sprintf("peering: %T does not marshal: %v", row, err))
	}
	return value
}

// Peers are the records of all peers, ordered by name.
type Peers struct {
	List []Peer
	// Lost: the store was emptied, or restored from an older copy. What is missing in it is in the list all the same, since nobody has
	// withdrawn it: Restore puts it back.
	Lost bool
}

// WatchPeers delivers all records of peers, at once and whenever one has changed, until ctx ends. A record that cannot be read is told, and
// leaves what was read before. A slow reader gets the newest list only. Lists are the reader's.
func WatchPeers(ctx context.Context, store kvstore.Store, warn func(key string, err error)) <-chan Peers {
	lists := make(chan Peers)
	go func() {
		defer close(lists)
		w := peersWatch{peers: map[string]Peer{}, warn: warn}
		changes := store.Watch(ctx, PeersPrefix)
		var out chan<- Peers // nil until there is something new to deliver
		listed := false
		for {
			var news Peers
			if out != nil {
				news = w.all()
			}
			select {
			case batch, open := <-changes:
				if !open {
					return
				}
				w.apply(batch)
				if listed = listed || batch.Listed; listed {
					out = lists
				}
			case out <- news:
				out, w.lost = nil, false
			}
		}
	}()
	return lists
}

// peersWatch gathers records from a watch.
type peersWatch struct {
	peers    map[string]Peer
	revision int64
	lost     bool
	warn     func(key string, err error)
}

func (w *peersWatch) all() Peers {
	list := slices.SortedFunc(maps.Values(w.peers), func(a, b Peer) int { return strings.Compare(a.Name(), b.Name()) })
	return Peers{List: list, Lost: w.lost}
}

func (w *peersWatch) apply(batch kvstore.Batch) {
	// A store's revision only goes back if it is another one, or an older copy.
	lost := batch.Listed && batch.Revision < w.revision
	w.revision = batch.Revision
	w.lost = w.lost || lost
	for _, e := range batch.Events {
		if e.Kind == kvstore.EventDelete {
			if !lost {
				delete(w.peers, e.Key)
			}
			continue
		}
		p, err := DecodePeer(e.Key, e.Value)
		if err != nil {
			w.warn(e.Key, err)
			continue
		}
		w.peers[e.Key] = p
	}
}
