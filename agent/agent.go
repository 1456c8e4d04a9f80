package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"causeway/clustermesh"
	"causeway/clustermesh/peering"
	"causeway/datapath"
	"causeway/identity"
	"causeway/k8s"
	"causeway/kvstore"
	"causeway/lb"
	"causeway/tunnel"
)

// Version of what agents say to each other, for people and for other clusters; "clustermesh version" tells the build.
const Version = "0.1.0"

// How often this node makes its identities agree with the store, and how often a node of the cluster
// collects those that nobody uses: two passes find one, so that is also the outage that it survives.
const (
	identityInterval = 30 * time.Second
	sweepInterval    = 5 * time.Minute
)

// agent is what Run wires together.
type agent struct {
	cfg      Config
	log      *slog.Logger
	tables   *clustermesh.Tables
	refusals *clustermesh.Refusals
	claims   *clustermesh.Claims
	// assigned: the cluster's ID is not configured.
	assigned bool
	device   tunnel.Device
	datapath *datapath.Datapath
	routes   *tunnel.Routes
	// locals are the addresses of services that the node's L7 proxy answers at.
	locals   *tunnel.LocalAddresses
	enc      *encryption
	tunnels  *tunnels
	channels *channels
	peers    *peers
	proxies  *proxies
	links    *links
	local    *clustermesh.Local
	alloc    *identity.Allocator
	pods     *endpoints
	balancer *balance
	node     identity.Node
	// kubernetes is where this cluster's services come from; nil if they are declared by the local API.
	kubernetes *k8s.Source
	// exporter publishes what of them is for other clusters, if this agent is elected to; nil without kubernetes.
	exporter *clustermesh.Exporter
	// peering serves the API between clusters, and joins and leaves them.
	peering         *peering.Service
	peeringListener net.Listener
	view            *peerView
	certs           *certs
	clock           clock
	// resolver knows the names of the store's pods; nil if the store is none of Kubernetes'.
	resolver *net.Resolver
	// life is gossip, echo what it asks the data path with, signingKey what it signs with.
	life       *life
	echo       *datapath.Echo
	signingKey ed25519.PrivateKey
	// ringChanged gets a token when the gossip keys were changed on this node.
	ringChanged chan struct{}
	// settledChanged gets a token when settled may say something else of a cluster; nil without Kubernetes.
	settledChanged chan struct{}
	// wireGuardStatus reads this node's WireGuard back; nil if it does not encrypt.
	wireGuardStatus func() (tunnel.WireGuardStatus, error)

	mu     sync.Mutex
	synced map[identity.ClusterID]bool
	prunes []func()
	// problems of the reconcilers that no row shows.
	problems []func() []string
	// ranges serializes rangesChanged, which every follower may call.
	ranges sync.Mutex
}

// Run is the agent, until ctx ends. What it has put into the kernel stays and goes on forwarding.
//
// Read it as the wiring. Sources write tables: the local API through endpoints (pods) and services, or Kubernetes in its place, the
// followers (this cluster's store and, as the records of peers have it, each peer's), gossip (who is alive, and news to the followers), local (what this
// node owns), balance (what it translates). Reconcilers
// read tables and make one target agree each: BPF maps, routes, the store.
func Run(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	cfg.setDefaults()
	if err := cfg.check(); err != nil {
		return err
	}
	a := &agent{cfg: cfg, log: log, refusals: clustermesh.NewRefusals(), synced: map[identity.ClusterID]bool{}, ringChanged: make(chan struct{}, 1)}
	if a.clock, err = newClock(); err != nil {
		return err
	}
	if a.tables, err = clustermesh.NewTables(); err != nil {
		return err
	}
	if err := a.tables.DB.Start(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.tables.DB.Stop()) }()
	// First of all: a second agent must not touch what a live one works on.
	listener, err := listen(cfg.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	metrics, err := listenMetrics(cfg.Metrics.Listen)
	if err != nil {
		return err
	}
	if metrics != nil {
		defer metrics.Close()
	}
	discovery, err := listenXDS(cfg.XDS.Listen)
	if err != nil {
		return err
	}
	if discovery != nil {
		defer discovery.Close()
	}
	if err := a.dial(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.own().store.Close()) }()
	if err := a.findClusterID(ctx); err != nil {
		return err
	}
	if err := a.setupKernel(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.enc.Close(), a.locals.Close(), a.routes.Close(), a.datapath.Close()) }()

	if err := a.setupSources(); err != nil {
		return err
	}
	if err := a.setupKubernetes(); err != nil {
		return err
	}
	a.setupExporter()
	if err := a.setupGossip(); err != nil {
		return err
	}
	if err := a.setupPeering(); err != nil {
		return err
	}

	if err := a.setupProxies(); err != nil {
		return err
	}

	tasks, ctx := errgroup.WithContext(ctx)
	// Before all else: the others have sessions with this node's earlier life, and hear of this one when it asks them.
	tasks.Go(func() error { return a.enc.Run(ctx) })
	if err := a.followPeers(ctx, tasks); err != nil {
		return errors.Join(err, tasks.Wait())
	}
	a.reconcile(ctx, tasks)
	a.followOwn(ctx, tasks)
	a.followKubernetes(ctx, tasks)
	a.export(ctx, tasks)
	tasks.Go(func() error { return a.watchClusterID(ctx) })
	tasks.Go(func() error { return a.local.Run(ctx) })
	tasks.Go(func() error { return a.pods.Run(ctx) })
	tasks.Go(func() error { return a.balancer.Run(ctx) })
	tasks.Go(func() error { return a.tunnels.Run(ctx) })
	tasks.Go(func() error { return a.proxies.Run(ctx) })
	tasks.Go(func() error { return newHealthChecks(a).Run(ctx) })
	a.startGossip(ctx, tasks)
	a.startPeering(ctx, tasks)
	tasks.Go(func() error { return a.watchCarrier(ctx) })
	tasks.Go(func() error { return a.maintainIdentities(ctx) })
	api := a.api()
	tasks.Go(func() error { return serve(ctx, listener, api.handler()) })
	if metrics != nil {
		tasks.Go(func() error {
			return serveMetrics(ctx, metrics, metricsHandler(api.tables.snapshot, a.proxies.metrics))
		})
	}
	if discovery != nil {
		feed := newXDSFeed(a)
		tasks.Go(func() error { return feed.Run(ctx, discovery) })
	}
	log.Info("agent runs", "node", cfg.Cluster.Name+"/"+cfg.Node.Name, "podMTU", a.device.MTU, "encryption", cfg.Encryption.Mode, "attach", a.datapath.Attach())
	return tasks.Wait()
}

// carrierPause is the time after which the link is watched again if that failed: a burst of changes may overflow the kernel's
// queue of news.
const carrierPause = time.Second

// watchCarrier has the node be heard again as soon as its link is back. It is a help, not a condition: packets flow without it.
func (a *agent) watchCarrier(ctx context.Context) error {
	for {
		err := tunnel.WatchCarrier(ctx, a.cfg.Node.Address)
		if err == nil {
			return nil
		}
		a.log.Warn("after a loss of the link it may take the node a second longer to be heard again", "error", err)
		select {
		case <-time.After(carrierPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// setupKernel makes the tunnel's devices and loads the programs, or takes over those that are there. The programs come first: their guard
// lets nothing leave in the clear that should be encrypted.
func (a *agent) setupKernel(ctx context.Context) (err error) {
	if err := datapath.Check(); err != nil {
		return err
	}
	if a.cfg.Cgroup == "" {
		if a.cfg.Cgroup, err = datapath.CgroupRoot(); err != nil {
			return err
		}
	}
	mtu, index, err := a.underlay()
	if err != nil {
		return err
	}
	self := a.self()
	var podSideOther netip.Addr
	for _, a := range self.PodSides() {
		if a != self.PodSide() {
			podSideOther = a
		}
	}
	a.device, err = tunnel.EnsureVXLAN(tunnel.Config{
		Name: tunnel.DefaultName, Port: a.cfg.Node.VXLANPort, MTU: mtu.of(a.cfg.Encryption.Mode), Address: a.cfg.Node.Address,
		IPv6: slices.ContainsFunc(self.PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }),
	})
	if err != nil {
		return err
	}
	a.datapath, err = datapath.Load(datapath.Config{
		PinDir: a.cfg.BPFFS, CgroupPath: a.cfg.Cgroup, ClusterID: a.cfg.Cluster.ID, NodeAddress: a.cfg.Node.Address,
		VXLANIndex: a.device.Index, VXLANPort: a.cfg.Node.VXLANPort, PodMTU: a.device.MTU, Log: a.log,
		PodSide: self.PodSide(), PodSideOther: podSideOther, Tunnel: [identity.TunnelSlots]netip.Addr{self.TunnelAddress(0), self.TunnelAddress(1)}, UnderlayIndex: index,
	})
	if err != nil {
		return err
	}
	if a.routes, err = tunnel.NewRoutes(a.device, a.cfg.Node.Address); err != nil {
		return errors.Join(err, a.datapath.Close())
	}
	if a.locals, err = tunnel.NewLocalAddresses(a.cfg.Node.Address, self.PodSides()); err != nil {
		return errors.Join(err, a.routes.Close(), a.datapath.Close())
	}
	if err := a.setupEncryption(ctx, mtu); err != nil {
		return errors.Join(err, a.locals.Close(), a.routes.Close(), a.datapath.Close())
	}
	a.tunnels = newTunnels(a.tables, a.enc)
	return nil
}

// underlay looks at the link between the nodes: how large packets of pods may be on it, and its interface index.
func (a *agent) underlay() (mtu podMTUs, index int, err error) {
	node, self := a.cfg.Node.Address, a.self()
	if index, mtu.underlay, err = tunnel.FindUnderlay(node); err != nil {
		return mtu, 0, err
	}
	mtu.plain, mtu.encrypted = tunnel.PodMTU(mtu.underlay, node), tunnel.EncryptedPodMTU(mtu.underlay, node, self.TunnelAddress(0))
	return mtu, index, nil
}

// dial opens the own store, which need not answer now.
func (a *agent) dial(ctx context.Context) error {
	k, name := a.cfg.KVStore, a.cfg.Cluster.Name
	if err := a.setupResolver(); err != nil {
		return err
	}
	store, err := kvstore.Dial(ctx, kvstore.Config{
		Endpoints: k.Endpoints, CAFile: k.CAFile, CertFile: k.CertFile, KeyFile: k.KeyFile, Log: a.log.With("store", name), Dial: a.storeDialer(),
	})
	if err != nil {
		return fmt.Errorf("store of cluster %s: %w", name, err)
	}
	a.channels = newChannels(&channel{cluster: name, id: a.cfg.Cluster.ID, local: true, store: store})
	return nil
}

// own is the channel of this node's own cluster.
func (a *agent) own() *channel { return a.channels.own }

// setupSources makes what writes tables, and lets this node and its endpoints of an earlier life appear in them.
func (a *agent) setupSources() (err error) {
	instance, err := loadInstance(filepath.Join(a.cfg.StateDir, "instance"))
	if err != nil {
		return err
	}
	incarnation, err := nextIncarnation(filepath.Join(a.cfg.StateDir, "incarnation"), time.Now())
	if err != nil {
		return err
	}
	if a.signingKey, err = loadSigningKey(filepath.Join(a.cfg.StateDir, "gossip-signing.key")); err != nil {
		return err
	}
	a.node = identity.Node{
		Cluster: a.cfg.Cluster.Name, ClusterID: a.cfg.Cluster.ID, Name: a.cfg.Node.Name, Address: a.cfg.Node.Address,
		PodCIDRs: a.cfg.Node.PodCIDRs, Instance: instance,
		GossipKey: publicKey(a.signingKey), TunnelKeys: a.enc.keys(), MTU: a.device.MTU,
		Version: identity.Version{Incarnation: incarnation, Sequence: 1},
	}
	a.claims = clustermesh.NewClaims(a.cfg.info())
	a.local, err = clustermesh.NewLocal(clustermesh.LocalConfig{
		Tables: a.tables, Node: a.node, Cluster: a.cfg.info(), Kubernetes: a.cfg.Kubernetes.Enabled(), Log: a.log,
	})
	if err != nil {
		return err
	}
	a.balancer = newBalance(a.tables, a.node, newGuard(a.cfg, a.tables, a.claims, a.channels.storeAt), a.refusals)
	a.alloc = identity.NewAllocator(a.own().store, a.cfg.Cluster.Name, a.cfg.Cluster.ID, a.cfg.Node.Name, a.log)
	a.pods = newEndpoints(a.tables, a.alloc, a.cfg, a.device.MTU, a.log)
	own := a.own().store
	a.pods.away = func() bool { return !own.Status().Connected }
	a.problems = append(a.problems, a.pods.problems)
	return a.pods.Restore()
}

// loadInstance returns what tells this machine from another one of the same name.
func loadInstance(file string) (string, error) {
	data, err := os.ReadFile(file)
	if instance := strings.TrimSpace(string(data)); err == nil && instance != "" {
		return instance, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	instance := strings.ToLower(rand.Text())
	return instance, writeFile(file, []byte(instance+"\n"))
}

// nextIncarnation is the time, or more than the last one if the clock went back since: what this node says
// from now on must count more than all that it has said before.
func nextIncarnation(file string, now time.Time) (uint64, error) {
	next := uint64(now.UnixNano())
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if last, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err == nil && last < math.MaxInt64 {
		next = max(next, last+1)
	}
	return next, writeFile(file, []byte(strconv.FormatUint(next, 10)+"\n"))
}

// reconcile starts the loops that make the kernel and the store agree with the tables.
func (a *agent) reconcile(ctx context.Context, tasks *errgroup.Group) {
	d, t := a.datapath, a.tables
	start(ctx, tasks, a, "tunnels", t.Tunnels, chain[identity.Tunnel]{a.enc, d.Tunnels(), a.routes}, tunnelMoved)
	start(ctx, tasks, a, "addresses", t.Addresses, d.Addresses(), nil)
	start(ctx, tasks, a, "endpoints", t.Endpoints, d.Endpoints(), func(old, now identity.Endpoint) bool {
		return old.Address != now.Address || old.Address6 != now.Address6
	})
	start(ctx, tasks, a, "frontends", t.Frontends, chain[lb.Frontend]{a.locals, d.Frontends(), a.locals.Unused()}, nil)
	start(ctx, tasks, a, "targets", t.Targets, d.Targets(), nil)
	start(ctx, tasks, a, "publications", t.Publications, &clustermesh.Publisher{Store: a.own().store, Node: a.node, Assigned: a.assigned}, nil)
}

// start runs a reconciler, and lets it prune now (what is of clusters that are followed no more) and whenever a
// channel has synced.
func start[T any](ctx context.Context, tasks *errgroup.Group, a *agent, name string, table clustermesh.Table[T], target Target[T], moved func(old, now T) bool) {
	r := newReconciler(name, a.tables, table, target, a.isSynced, a.log)
	r.moved = moved
	r.Prune()
	a.prunes = append(a.prunes, r.Prune)
	a.problems = append(a.problems, r.problems)
	tasks.Go(func() error { return r.Run(ctx) })
}

// wakeUp gives a token to who waits for one, unless there is one already.
func wakeUp(tokens chan struct{}) {
	select {
	case tokens <- struct{}{}:
	default:
	}
}

func (a *agent) api() *server {
	l7 := a.l7View()
	return &server{
		tables: &view{
			cfg: a.cfg, started: time.Now(), tables: a.tables, refusals: a.refusals, channels: a.channels,
			datapath: a.datapath, device: tunnel.DefaultName, mtu: a.device.MTU, more: a.problems, life: a.life, peers: a.view, enc: a.enc, l7: l7,
			kubernetes: a.kubernetes, exporter: a.exporter,
		},
		agent:     a,
		life:      a.life,
		feed:      a.l7Feed(time.Now()),
		endpoints: a.pods,
		services:  &services{tables: a.tables, store: a.own().store, cluster: a.cfg.Cluster, guard: newGuard(a.cfg, a.tables, a.claims, a.channels.storeAt), refusals: a.refusals, kubernetes: a.kubernetes != nil},
	}
}

// maintainIdentities makes the store agree with the identities in use, and collects what nobody uses.
func (a *agent) maintainIdentities(ctx context.Context) error {
	agree := time.NewTicker(identityInterval)
	defer agree.Stop()
	sweep := time.NewTicker(sweepInterval)
	defer sweep.Stop()
	for {
		changes, err := a.alloc.Reconcile(ctx)
		if err != nil && ctx.Err() == nil {
			a.log.Debug("identities are not confirmed yet", "error", err)
		}
		for _, change := range changes {
			if err := a.pods.Renumber(change); err != nil {
				a.log.Error("endpoints have a new identity that will not survive a restart", "labels", change.Labels, "error", err)
			}
		}
		select {
		case <-agree.C:
		case <-sweep.C:
			if _, err := a.alloc.Sweep(ctx); err != nil && ctx.Err() == nil {
				a.log.Debug("unused identities are not collected yet", "error", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}
