package k8s

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/cilium/statedb"
	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"causeway/lb"
)

// Source is this cluster's Kubernetes: it writes Services and EndpointSlices as rows of the own cluster into the tables services and backends, and knows
// the labels of this node's pods. When the API server is away the rows stay; when it is back, what was deleted meanwhile goes.
//
// Each kind of object is followed by a reflector of client-go, which lists, watches, and lists anew when a watch has expired. No object is kept: what a
// row has, and a few words of each object to find its rows by, is all.
type Source struct {
	cfg    Config
	server string
	core   rest.Interface
	slices rest.Interface
	api    contact
	events *recorder

	synced chan struct{}

	mu             sync.Mutex
	services       *services
	endpointSlices *endpointSlices
	pods           *pods
	// node: there is a Node of this node's name, as far as nodesListed.
	node, nodesListed bool
	// first are the lists that were read before all were.
	first map[string]func(statedb.WriteTxn) error
}

func newSource(cfg Config) *Source {
	s := &Source{cfg: cfg, synced: make(chan struct{}), first: map[string]func(statedb.WriteTxn) error{}}
	s.services = &services{Source: s, known: map[lb.Name]types.UID{}}
	s.endpointSlices = &endpointSlices{
		Source: s, known: map[types.NamespacedName]knownSlice{}, doubles: map[lb.Name]map[netip.Addr][]lb.Backend{}, nodes: map[string]string{},
	}
	s.pods = newPods(s)
	s.events = newRecorder(s)
	return s
}

// Synced is closed when the tables have all Services and EndpointSlices that there were when Run began: what they have not is stale. They appear
// there in one transaction.
func (s *Source) Synced() <-chan struct{} { return s.synced }

// Run follows the API server until ctx ends. It never fails: what is wrong, Status says.
func (s *Source) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(quiet{s.cfg.Log.Handler()}))
	tasks, ctx := errgroup.WithContext(ctx)
	serviceOf := fmt.Sprintf("%s,%s!=%s", discoveryv1.LabelServiceName, discoveryv1.LabelManagedBy, ManagedBy)
	follow(ctx, tasks, s, s.core, kind[*corev1.Service]{
		name: "services", slim: slimService, all: s.services.all, put: s.services.put, drop: s.services.drop, tables: true,
	})
	follow(ctx, tasks, s, s.slices, kind[*discoveryv1.EndpointSlice]{
		name: "endpointslices", labels: serviceOf, slim: slimSlice, all: s.endpointSlices.all, put: s.endpointSlices.put, drop: s.endpointSlices.drop, tables: true,
	})
	follow(ctx, tasks, s, s.core, kind[*corev1.Pod]{
		name: "pods", fields: fields.OneTermEqualSelector("spec.nodeName", s.cfg.Node), slim: slimPod, all: s.pods.all, put: s.pods.put, drop: s.pods.drop,
	})
	follow(ctx, tasks, s, s.core, kind[*corev1.Node]{
		name: "nodes", fields: fields.OneTermEqualSelector(metav1.ObjectNameField, s.cfg.Node), slim: slimNode,
		all: func(_ statedb.WriteTxn, nodes []*corev1.Node) error {
			s.node, s.nodesListed = len(nodes) > 0, true
			return nil
		},
		put:  func(statedb.WriteTxn, *corev1.Node) error { s.node = true; return nil },
		drop: func(statedb.WriteTxn, *corev1.Node) error { s.node = false; return nil },
	})
	tasks.Go(func() error { return s.api.watch(ctx, s.core, s.cfg.Log) })
	tasks.Go(func() error { return s.events.run(ctx) })
	return tasks.Wait()
}

// object is a pointer to a kind of object of the API server.
type object interface {
	runtime.Object
	metav1.Object
}

// kind is a kind of object that is followed, and what becomes of it. all, put and drop are called with Source.mu held.
type kind[T object] struct {
	name   string // as in URLs
	fields fields.Selector
	labels string
	// slim drops what nobody looks at.
	slim func(T)
	// all brings what there was before into step with all objects that there are now.
	all  func(statedb.WriteTxn, []T) error
	put  func(statedb.WriteTxn, T) error
	drop func(statedb.WriteTxn, T) error
	// tables: it has rows.
	tables bool
}

// How long a reflector waits before it tries again: twice as long each time, up to the most, and up to twice that at random, so that not all nodes come
// at once when the API server is back.
const (
	retryFirst = 200 * time.Millisecond
	retryMost  = 3 * time.Second
)

// follow starts the reflector of a kind.
func follow[T object](ctx context.Context, tasks *errgroup.Group, s *Source, client rest.Interface, k kind[T]) {
	from := cache.NewFilteredListWatchFromClient(client, k.name, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.LabelSelector = k.labels
		if k.fields != nil {
			o.FieldSelector = k.fields.String()
		}
	})
	watched := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := from.ListWithContext(ctx, o)
			s.api.noteKind(k.name, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := from.WatchWithContext(ctx, o)
			s.api.noteKind(k.name, err)
			return w, err
		},
	}
	var expected T
	r := cache.NewReflectorWithOptions(watched, expected, &store[T]{s: s, kind: k, ctx: ctx}, cache.ReflectorOptions{
		Name: k.name, Backoff: &wait.Backoff{Duration: retryFirst, Cap: retryMost, Steps: 10, Factor: 2, Jitter: 1},
	})
	tasks.Go(func() error { r.RunWithContext(ctx); return nil })
}

// store is where a reflector puts what it gets.
type store[T object] struct {
	s    *Source
	kind kind[T]
	ctx  context.Context // Run's, while the store waits for other kinds
}

func (st *store[T]) Add(o any) error    { return st.one(o, st.kind.put) }
func (st *store[T]) Update(o any) error { return st.one(o, st.kind.put) }
func (st *store[T]) Delete(o any) error { return st.one(o, st.kind.drop) }
func (st *store[T]) Resync() error      { return nil }

// Transformer slims the objects of a list while it is read.
func (st *store[T]) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		if object, ok := o.(T); ok {
			st.kind.slim(object)
		}
		return o, nil
	}
}

// one applies one change.
func (st *store[T]) one(o any, f func(statedb.WriteTxn, T) error) error {
	object, ok := o.(T)
	if !ok {
		return fmt.Errorf("%s: got a %T", st.kind.name, o)
	}
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	return st.s.transact(st.kind.tables, func(txn statedb.WriteTxn) error { return f(txn, object) })
}

// Replace applies a whole list.
func (st *store[T]) Replace(list []any, _ string) error {
	objects := make([]T, 0, len(list))
	for _, o := range list {
		object, ok := o.(T)
		if !ok {
			return fmt.Errorf("%s: got a %T", st.kind.name, o)
		}
		objects = append(objects, object)
	}
	all := func(txn statedb.WriteTxn) error { return st.kind.all(txn, objects) }
	if !st.kind.tables {
		st.s.mu.Lock()
		defer st.s.mu.Unlock()
		return all(nil)
	}
	return st.s.replace(st.ctx, st.kind.name, all)
}

// replace applies a list of what has rows: at first not before all such kinds have been listed, so that nobody sees services without backends.
func (s *Source) replace(ctx context.Context, name string, all func(statedb.WriteTxn) error) error {
	s.mu.Lock()
	if closed(s.synced) {
		defer s.mu.Unlock()
		return s.transact(true, all)
	}
	s.first[name] = all
	if len(s.first) < tableKinds {
		s.mu.Unlock()
		select {
		case <-s.synced:
		case <-ctx.Done():
		}
		return nil
	}
	defer s.mu.Unlock()
	err := s.transact(true, func(txn statedb.WriteTxn) error {
		for _, f := range s.first {
			if err := f(txn); err != nil {
				return err
			}
		}
		return nil
	})
	s.first = nil
	if err == nil {
		close(s.synced)
	}
	return err
}

// tableKinds is how many kinds have rows.
const tableKinds = 2

// transact runs f in a transaction of the tables, if rows are to be written.
func (s *Source) transact(tables bool, f func(statedb.WriteTxn) error) error {
	if !tables {
		return f(nil)
	}
	t := s.cfg.Tables
	txn := t.DB.WriteTxn(t.Services, t.Backends)
	defer txn.Abort()
	if err := f(txn); err != nil {
		s.cfg.Log.Error("the tables are not as Kubernetes has it", "error", err)
		return err
	}
	txn.Commit()
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// What nobody looks at.

func slimMeta(m *metav1.ObjectMeta) {
	*m = metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: m.Labels}
}

func slimService(s *corev1.Service) {
	annotations := ourAnnotations(s.Annotations)
	slimMeta(&s.ObjectMeta)
	s.Annotations, s.Spec.Selector, s.Status.Conditions = annotations, nil, nil
}

func slimSlice(s *discoveryv1.EndpointSlice) {
	slimMeta(&s.ObjectMeta)
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		e.Zone, e.Hints, e.DeprecatedTopology = nil, nil, nil
	}
}

func slimPod(p *corev1.Pod) {
	slimMeta(&p.ObjectMeta)
	p.Spec, p.Status = corev1.PodSpec{}, corev1.PodStatus{}
}

func slimNode(n *corev1.Node) {
	slimMeta(&n.ObjectMeta)
	n.Spec, n.Status = corev1.NodeSpec{}, corev1.NodeStatus{}
}
