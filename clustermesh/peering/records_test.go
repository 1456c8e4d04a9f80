package peering

import (
	"context"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
	"causeway/lb"
)

// samplePeer is west, as it is in east's store.
func samplePeer(t testing.TB) Peer {
	authority := mustGet[*pki.Authority](t)(pki.NewAuthority("west", time.Now()))
	pair := mustGet[pki.Pair](t)(authority.Issue(pki.Request{User: "peer-east-aaaaaaaa"}, time.Now()))
	return Peer{
		Cluster: sampleInfo("west", 2), State: Connected, Since: time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC),
		StoreEndpoints: []string{"https://172.29.2.2:2379"}, Endpoints: []string{"172.29.2.11:7958"}, Authority: string(authority.CertPEM()),
		Cert: string(pair.Cert), Key: string(pair.Key), User: "peer-west-bbbbbbbb", UserExpires: time.Date(2026, 12, 30, 12, 0, 0, 0, time.UTC),
	}
}

func TestPeerIsReadAsItWasWritten(t *testing.T) {
	want := samplePeer(t)
	value := EncodePeer(want)
	got, err := DecodePeer(PeerKey("west"), value)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if len(value) > lb.MaxValue {
		t.Errorf("it takes %d bytes", len(value))
	}
}

func TestPeerIsRefused(t *testing.T) {
	for _, tc := range []struct {
		want   string
		change func(*Peer)
	}{
		{"of cluster north, but the key of another", func(p *Peer) { p.Cluster.Name = "north"; p.User = "peer-north-aaaaaaaa" }},
		{"cluster ID is missing", func(p *Peer) { p.Cluster.ID = 0 }},
		{"none of joining, connected and left", func(p *Peer) { p.State = "happy" }},
		{"store: 0 endpoints", func(p *Peer) { p.StoreEndpoints = nil }},
		{"store: endpoint", func(p *Peer) { p.StoreEndpoints = []string{"http://172.29.2.2:2379"} }},
		{"API: endpoint", func(p *Peer) { p.Endpoints = []string{"https://172.29.2.2:7958"} }},
		{"authority", func(p *Peer) { p.Authority = "" }},
		{"certificate", func(p *Peer) { p.Key = samplePeer(t).Key }},
		{"is not one of cluster west", func(p *Peer) { p.User = "agent" }},
		{"is not one of cluster west", func(p *Peer) { p.User = "peer-north-aaaaaaaa" }},
		{"since or userExpires is missing", func(p *Peer) { p.Since = time.Time{} }},
	} {
		p := samplePeer(t)
		tc.change(&p)
		_, err := DecodePeer(PeerKey("west"), EncodePeer(p))
		wantError(t, err, tc.want)
		if err != nil && strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("the error shows a key: %v", err)
		}
	}
	_, err := DecodePeer(AuthorityKey, EncodePeer(samplePeer(t)))
	wantError(t, err, "does not begin with")
}

func TestWatchPeers(t *testing.T) {
	store := kvstore.NewMemory()
	defer store.Close()
	ctx, cancel := context.WithCancel(t.Context())
	warned := make(chan string, 8)
	lists := WatchPeers(ctx, store, func(key string, err error) { warned <- key })
	names := func(list Peers) (all string) {
		for _, p := range list.List {
			all += p.Name() + "=" + string(p.State) + " "
		}
		return all
	}
	if got := names(<-lists); got != "" {
		t.Errorf("at first %q", got)
	}
	west := samplePeer(t)
	north := west
	north.Cluster, north.User = sampleInfo("north", 3), "peer-north-aaaaaaaa"
	put := func(p Peer) { must(t, store.Put(ctx, PeerKey(p.Name()), EncodePeer(p))) }
	put(west)
	put(north)
	west.State = Left
	put(west)
	must(t, store.Put(ctx, PeerKey("bad"), []byte("{}")))
	if key := <-warned; key != PeerKey("bad") { // by then the reader is three lists behind
		t.Errorf("warned of %s", key)
	}
	want := "north=connected west=left "
	if got := names(<-lists); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	must(t, store.Delete(ctx, PeerKey("north")))
	if got := names(<-lists); got != "west=left " {
		t.Errorf("got %q", got)
	}
	cancel()
	for range lists { // it ends
	}
}

func FuzzDecodePeer(f *testing.F) {
	f.Add(EncodePeer(samplePeer(f)))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, value []byte) {
		p, err := DecodePeer(PeerKey("west"), value)
		if err != nil {
			return
		}
		again, err := DecodePeer(PeerKey("west"), EncodePeer(p))
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Errorf("%+v is read as %+v: %v", p, again, err)
		}
	})
}

func FuzzTokenRecord(f *testing.F) {
	id := "aaaaaaaaaaaaa"
	f.Add(encodeTokenRecord(TokenRecord{ID: id, Secret: make([]byte, 32)}))
	f.Fuzz(func(t *testing.T, value []byte) {
		if r, err := decodeTokenRecord(tokenKey(id), value); err == nil {
			if _, err := json.Marshal(r); err == nil && len(encodeTokenRecord(r)) == 0 {
				t.Error("written as nothing")
			}
		}
	})
}

// TestWatchPeersOutlivesItsStore: a store that was emptied has withdrawn nobody, and gets back what it has lost.
func TestWatchPeersOutlivesItsStore(t *testing.T) {
	west := samplePeer(t)
	w := peersWatch{peers: map[string]Peer{}, warn: func(key string, err error) { t.Errorf("%s: %v", key, err) }}
	key := PeerKey(west.Name())
	put := kvstore.Event{Kind: kvstore.EventPut, Entry: kvstore.Entry{Key: key, Value: EncodePeer(west), Revision: 40}}
	gone := kvstore.Event{Kind: kvstore.EventDelete, Entry: kvstore.Entry{Key: key}}
	w.apply(kvstore.Batch{Events: []kvstore.Event{put}, Listed: true, Revision: 50})
	w.apply(kvstore.Batch{Events: []kvstore.Event{gone}, Listed: true, Revision: 3})
	if all := w.all(); len(all.List) != 1 || !all.Lost {
		t.Errorf("the store was emptied, and the peers are %+v", all)
	}
	w.apply(kvstore.Batch{Events: []kvstore.Event{gone}, Revision: 4})
	if all := w.all(); len(all.List) != 0 {
		t.Errorf("the peer was disconnected, and the peers are %+v", all)
	}
}
