package clustermesh

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cilium/statedb"
	"golang.org/x/time/rate"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

const (
	// exportOps and exportBytes bound one transaction, well within etcd's limits.
	exportOps   = 100
	exportBytes = 512 << 10
	// exportRate is how many transactions there are in a second at most, and exportBurst how many without a pause. What changes meanwhile is written
	// together, so a cluster in turmoil costs its peers no more than that.
	exportRate  = 100
	exportBurst = 20
)

// item is what is published under one key: a service, or a slice of it.
type item struct {
	service lb.Name
	slice   string // as rows of the cluster's own name it; "" for the service
}

func (i item) key(cluster string) string {
	if i.slice == "" {
		return lb.ServiceKey(cluster, i.service)
	}
	return lb.SliceKey(cluster, i.service, lb.ClusterSliceName(i.slice))
}

// compare orders items for writing: services before slices, which are no use without them.
func (i item) compare(j item) int {
	if (i.slice == "") != (j.slice == "") {
		return strings.Compare(i.slice, j.slice)
	}
	return strings.Compare(i.key(""), j.key(""))
}

// itemOf is the inverse of key; false for a key that no exporter writes.
func itemOf(cluster, key string) (item, bool) {
	if rest, ok := strings.CutPrefix(key, lb.ServicesPrefix(cluster)); ok {
		namespace, name, ok := strings.Cut(rest, "/")
		return item{service: lb.Name{Namespace: namespace, Name: name}}, ok && !strings.Contains(name, "/")
	}
	rest, ok := strings.CutPrefix(key, lb.SlicesPrefix(cluster))
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 {
		return item{}, false
	}
	slice, ok := strings.CutPrefix(parts[2], lb.ClusterSliceName(""))
	return item{lb.Name{Namespace: parts[0], Name: parts[1]}, slice}, ok && slice != ""
}

// sighting is what the store was seen to have of an item: sightOf its value.
type sighting struct {
	item
	value uint64
}

// absent is the sight of what is not there, and unknown the content of what has to be written anew whatever it is.
const (
	absent  = 0
	unknown = 0
)

func sightOf(there bool, value []byte) uint64 {
	if !there {
		return absent
	}
	return max(xxhash.Sum64(value), 1)
}

// export is what an elected agent knows of what it publishes. All of it belongs to one goroutine, and ends with the term.
type export struct {
	*Exporter
	fence    kvstore.Condition
	term     uint64
	sequence uint64
	services statedb.ChangeIterator[*Row[lb.Service]]
	backends statedb.ChangeIterator[*Row[lb.Backend]]
	limit    *rate.Limiter

	// places has, of each service whose backends are shared, the slice that each is in.
	places map[lb.Name]map[netip.Addr]string
	// dirty items may be another in the tables than in the store.
	dirty map[item]struct{}
	// stored is the content, without the version, of what is in the store, or may be.
	stored map[item]uint64
	// written are the sights of what this agent has written, oldest first, and that were not seen in the store yet.
	written map[item][]uint64
	// problems are why items are not published, or not all of them.
	problems map[item]error
	// compared: stored is what the store said. marked: that all is published was said since.
	compared, marked bool
}

// maxWritten bounds the sights that are kept of an item. If there are more, an older one counts as another's, and the item is written once more.
const maxWritten = 16

func newExport(e *Exporter, revision int64, term uint64) (*export, error) {
	x := &export{
		Exporter: e, fence: kvstore.Condition{Key: leaderKey, Revision: revision}, term: term, limit: rate.NewLimiter(exportRate, exportBurst),
		places: map[lb.Name]map[netip.Addr]string{}, dirty: map[item]struct{}{}, stored: map[item]uint64{}, written: map[item][]uint64{}, problems: map[item]error{},
	}
	t := e.Tables
	txn := t.DB.WriteTxn(t.Services, t.Backends)
	defer txn.Abort()
	var err error
	if x.services, err = t.Services.Changes(txn); err != nil {
		return nil, err
	}
	if x.backends, err = t.Backends.Changes(txn); err != nil {
		return nil, err
	}
	txn.Commit()
	return x, nil
}

func (x *export) close() {
	x.services.Close()
	x.backends.Close()
}

// step brings the store to what the tables say. It returns what closes when they say something else.
func (x *export) step(ctx context.Context) (changed [2]<-chan struct{}, err error) {
	seen, relisted := x.observed()
	if relisted {
		x.compared = false
	}
	for _, s := range seen {
		x.see(s)
	}
	changed = x.gather()
	if err := available(x.Store); err != nil {
		return changed, err
	}
	if !x.compared {
		if err := x.compare(ctx); err != nil {
			return changed, err
		}
	}
	if err := x.flush(ctx); err != nil {
		return changed, err
	}
	if x.marked {
		return changed, nil
	}
	beat := identity.EncodeHeartbeat(identity.Heartbeat{At: time.Now(), Node: x.Node})
	err = x.write(ctx, []kvstore.Op{{Kind: kvstore.OpPut, Key: identity.SyncedKey(x.Cluster.Name, identity.ServicesMark), Value: beat}})
	x.marked = err == nil
	return changed, err
}

// gather notes what has changed in the tables.
func (x *export) gather() (changed [2]<-chan struct{}) {
	read := x.Tables.DB.ReadTxn()
	services, more := x.services.Next(read)
	changed[0] = more
	for change := range services {
		if s := change.Object.Object; s.Cluster == x.Cluster.Name {
			x.dirty[item{service: s.Name}] = struct{}{}
			x.share(read, s.Name, !change.Deleted && s.Global && s.Shared)
		}
	}
	backends, more := x.backends.Next(read)
	changed[1] = more
	for change := range backends {
		if b := change.Object.Object; b.Cluster == x.Cluster.Name {
			x.place(b, change.Deleted)
		}
	}
	return changed
}

// share begins or ends to publish the backends of a service.
func (x *export) share(read statedb.ReadTxn, name lb.Name, shared bool) {
	places, was := x.places[name]
	switch {
	case shared && !was:
		x.places[name] = map[netip.Addr]string{}
		for row := range x.Tables.Backends.Prefix(read, x.Tables.Backends.ByKey(x.Cluster.Name+"/"+name.String()+"/")) {
			x.place(row.Object, false)
		}
	case !shared && was:
		for _, slice := range places {
			x.dirty[item{name, slice}] = struct{}{}
		}
		delete(x.places, name)
	}
}

// place notes in which slice a backend is now, and that that one has changed, and the one that it was in.
func (x *export) place(b lb.Backend, gone bool) {
	places, shared := x.places[b.Service]
	if !shared {
		return
	}
	if old, was := places[b.Address]; was {
		x.dirty[item{b.Service, old}] = struct{}{}
	}
	if gone {
		delete(places, b.Address)
		return
	}
	places[b.Address] = b.Slice
	x.dirty[item{b.Service, b.Slice}] = struct{}{}
}

// see looks at what the store has of an item: if that is not what this agent wrote, somebody else did, and it is put right.
func (x *export) see(s sighting) {
	if i := slices.Index(x.written[s.item], s.value); i >= 0 {
		if x.written[s.item] = x.written[s.item][i+1:]; len(x.written[s.item]) == 0 {
			delete(x.written, s.item)
		}
		return
	}
	if s.value == absent {
		delete(x.stored, s.item)
	} else {
		x.stored[s.item] = unknown
	}
	x.dirty[s.item] = struct{}{}
	if x.compared {
		x.Log.Warn("somebody else has changed what this agent publishes; it is put right", "key", s.key(x.Cluster.Name))
	}
}

// compare reads what the store has, and has everything looked at.
func (x *export) compare(ctx context.Context) error {
	stored := map[item]uint64{}
	for _, prefix := range []string{lb.ServicesPrefix(x.Cluster.Name), lb.SlicesPrefix(x.Cluster.Name)} {
		entries, err := x.Store.List(ctx, prefix)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if it, ok := itemOf(x.Cluster.Name, e.Key); ok {
				stored[it] = contentOf(e)
				x.dirty[it] = struct{}{}
			}
		}
	}
	for row := range x.Tables.Services.Prefix(x.Tables.DB.ReadTxn(), x.Tables.Services.ByKey(x.Cluster.Name+"/")) {
		x.dirty[item{service: row.Object.Name}] = struct{}{}
	}
	for name, places := range x.places {
		for _, slice := range places {
			x.dirty[item{name, slice}] = struct{}{}
		}
	}
	x.stored, x.compared, x.marked = stored, true, false
	return nil
}

// contentOf returns what the content of a stored entry is compared by.
func contentOf(e kvstore.Entry) uint64 {
	if !lb.OfClusterKey(e.Key) {
		return sightOf(true, e.Value)
	}
	slice, err := lb.DecodeSlice(e.Key, e.Value)
	if err != nil {
		return unknown
	}
	return contentOfSlice(slice)
}

func contentOfSlice(s lb.Slice) uint64 {
	s.Incarnation, s.Sequence = 0, 0
	return sightOf(true, lb.EncodeSlice(s))
}

// flush writes what is dirty and differs: first what comes, services before their slices, then what goes, the other way round. So nobody has a slice
// without its service, nor misses a backend that only moves from one slice to another.
func (x *export) flush(ctx context.Context) error {
	var puts, deletes []item
	read := x.Tables.DB.ReadTxn()
	for it := range x.dirty {
		if x.wanted(read, it) {
			puts = append(puts, it)
		} else {
			deletes = append(deletes, it)
		}
	}
	slices.SortFunc(puts, item.compare)
	slices.SortFunc(deletes, func(a, b item) int { return b.compare(a) })
	var batch exportBatch
	for _, it := range append(puts, deletes...) {
		if batch.full() {
			if err := x.writeBatch(ctx, &batch); err != nil {
				return err
			}
		}
		x.add(read, it, &batch)
	}
	return x.writeBatch(ctx, &batch)
}

// wanted tells whether there is something to publish of an item.
func (x *export) wanted(read statedb.ReadTxn, it item) bool {
	t := x.Tables
	if it.slice == "" {
		row, _, ok := t.Services.Get(read, t.Services.ByKey(x.Cluster.Name+"/"+it.service.String()))
		return ok && row.Object.Global
	}
	_, shared := x.places[it.service]
	_, _, ok := t.Backends.Get(read, t.backendsBySlice.Query(sliceKey(x.Cluster.Name, it.service, it.slice)))
	return shared && ok
}

// exportBatch is one transaction in the making.
type exportBatch struct {
	ops      []kvstore.Op
	items    []item
	contents []uint64
	bytes    int
}

func (b *exportBatch) full() bool { return len(b.ops) >= exportOps || b.bytes >= exportBytes }

// add brings an item into the batch if the store has something else of it.
func (x *export) add(read statedb.ReadTxn, it item, batch *exportBatch) {
	value, content, err := x.build(read, it)
	if err != nil {
		x.problems[it] = err
	} else {
		delete(x.problems, it)
	}
	held, there := x.stored[it]
	if there == (value != nil) && (!there || held == content) {
		delete(x.dirty, it)
		return
	}
	op := kvstore.Op{Kind: kvstore.OpDelete, Key: it.key(x.Cluster.Name)}
	if value != nil {
		op.Kind, op.Value = kvstore.OpPut, value
	}
	batch.ops, batch.items, batch.contents = append(batch.ops, op), append(batch.items, it), append(batch.contents, content)
	batch.bytes += len(op.Key) + len(value)
}

// build returns what is to be stored of an item, nil if nothing is, and the content that it is compared by. The error says what is left out, and why.
func (x *export) build(read statedb.ReadTxn, it item) (value []byte, content uint64, err error) {
	if !x.wanted(read, it) {
		return nil, 0, nil
	}
	t := x.Tables
	if it.slice != "" {
		return x.buildSlice(read, it)
	}
	row, _, _ := t.Services.Get(read, t.Services.ByKey(x.Cluster.Name+"/"+it.service.String()))
	service := row.Object.Exported()
	if err := lb.CheckService(service); err != nil {
		return nil, 0, fmt.Errorf("service %s cannot be told to other clusters: %w", it.service, err)
	}
	value = lb.EncodeService(service)
	return value, sightOf(true, value), nil
}

// buildSlice leaves out what other clusters would refuse with the whole slice.
func (x *export) buildSlice(read statedb.ReadTxn, it item) (value []byte, content uint64, left error) {
	t := x.Tables
	channel := identity.Channel{Cluster: x.Cluster.Name, ID: x.Cluster.ID, PodCIDRs: x.Cluster.PodCIDRs, Nodes: nodesIn{read, t}}
	var backends []lb.Backend
	for _, b := range objects(t.Backends.List(read, t.backendsBySlice.Query(sliceKey(x.Cluster.Name, it.service, it.slice)))) {
		if err := channel.CheckBackend(b); err != nil {
			left = fmt.Errorf("a backend of service %s is not told to other clusters: %w", it.service, err)
			continue
		}
		backends = append(backends, b)
	}
	if len(backends) == 0 {
		return nil, 0, left
	}
	slice, err := lb.ClusterSlice(backends)
	if err == nil {
		content = contentOfSlice(slice)
		x.sequence++
		slice.Incarnation, slice.Sequence = x.term, x.sequence
		err = lb.CheckSlice(slice)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("backends of service %s are not told to other clusters: %w", it.service, err)
	}
	return lb.EncodeSlice(slice), content, left
}

// writeBatch writes what has been gathered, and notes what the store has then.
func (x *export) writeBatch(ctx context.Context, batch *exportBatch) error {
	if len(batch.ops) == 0 {
		return nil
	}
	if err := x.limit.Wait(ctx); err != nil {
		return err
	}
	for i, it := range batch.items {
		sights := append(x.written[it], sightOf(batch.ops[i].Kind == kvstore.OpPut, batch.ops[i].Value))
		x.written[it] = sights[max(0, len(sights)-maxWritten):]
	}
	err := x.write(ctx, batch.ops)
	for i, it := range batch.items {
		switch {
		case err != nil:
			x.stored[it] = unknown // it may have been written
		case batch.ops[i].Kind == kvstore.OpPut:
			x.stored[it] = batch.contents[i]
			delete(x.dirty, it)
		default:
			delete(x.stored, it)
			delete(x.dirty, it)
		}
	}
	*batch = exportBatch{}
	return err
}

// write does one transaction, if this agent still is who publishes.
func (x *export) write(ctx context.Context, ops []kvstore.Op) error {
	err := x.Store.Txn(ctx, []kvstore.Condition{x.fence}, ops)
	if errors.Is(err, kvstore.ErrConflict) {
		return errDeposed
	}
	return err
}

// problem says what is not published, although it should be; nil if all is.
func (x *export) problem() error {
	if len(x.problems) == 0 {
		return nil
	}
	first := slices.SortedFunc(maps.Keys(x.problems), item.compare)[0]
	if len(x.problems) == 1 {
		return x.problems[first]
	}
	return fmt.Errorf("%w (and %d more like that)", x.problems[first], len(x.problems)-1)
}
