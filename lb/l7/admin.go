package l7

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/state"
)

// admin is what answers at the admin sockets; state/report.go has the calls.
type admin struct {
	http      *http.Server
	listeners net.Listener
	work      sync.WaitGroup
}

func (p *proxy) serveAdmin() (*admin, error) {
	a := &admin{}
	if p.cfg.Admin == "" {
		return a, nil
	}
	calls, err := listenUnix(p.cfg.Admin)
	if err != nil {
		return nil, err
	}
	if a.listeners, err = listenUnix(p.cfg.Admin + ".fds"); err != nil {
		calls.Close()
		return nil, err
	}
	a.http = &http.Server{Handler: p.adminCalls(), ReadHeaderTimeout: 10 * time.Second}
	a.work.Go(func() { a.http.Serve(calls) })
	a.work.Go(func() { p.handOnListeners(a.listeners) })
	return a, nil
}

func (a *admin) close() {
	if a.http != nil {
		a.listeners.Close()
		a.http.Close()
		a.work.Wait()
	}
}

// listenUnix listens at a path for the user alone. What a process that is no more has left there is removed.
func listenUnix(path string) (net.Listener, error) {
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("another proxy answers at %s: give this one an admin socket of its own", path)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(path)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("the admin socket can't be opened: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("the admin socket can't be kept from other users: %w", err)
	}
	return l, nil
}

func (p *proxy) adminCalls() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(p.observer, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "causeway_l7_connections", Help: "Connections of clients."},
		func() float64 { return float64(p.count.Load()) }))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/proxy", func(w http.ResponseWriter, _ *http.Request) { answer(w, p.status()) })
	mux.HandleFunc("GET /v1/ports", func(w http.ResponseWriter, _ *http.Request) { answer(w, p.portStatus()) })
	mux.HandleFunc("GET /v1/tap", p.tap)
	mux.HandleFunc("POST /v1/drain", func(w http.ResponseWriter, _ *http.Request) {
		p.drain()
		answer(w, p.status())
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	return mux
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) //nolint:errcheck // Who has gone needs no answer.
}

func (p *proxy) status() state.ProxyStatus {
	s := state.ProxyStatus{PID: os.Getpid(), Version: p.cfg.Version, Started: p.started, Draining: p.isDraining(), Connections: int(p.count.Load()), InFlight: p.observer.InFlight()}
	var problem string
	if s.Synced, problem = p.feed.status(); problem != "" {
		s.Problems = append(s.Problems, problem)
	}
	return s
}

func (p *proxy) portStatus() []state.PortStatus {
	frontends, _ := p.feed.all()
	list := []state.PortStatus{}
	for _, port := range p.table.Ports() {
		s := state.PortStatus{Route: *port.Route(), Frontends: frontends[port.Key()], Backends: []state.BackendStatus{}, Stats: p.observer.Stats(port)}
		for _, e := range port.Endpoints() {
			s.Backends = append(s.Backends, p.backendStatus(e))
		}
		list = append(list, s)
	}
	return list
}

func (p *proxy) backendStatus(e *balance.Endpoint) state.BackendStatus {
	h := e.Health()
	s := state.BackendStatus{Target: *e.Target(), Unhealthy: h.Unhealthy, Reason: h.Reason, Ejected: h.Ejected, InFlight: e.InFlight(), Ejections: h.Ejections}
	s.Requests, s.Failures = p.observer.Backend(e)
	return s
}

// tap writes a service's requests until its reader goes. What it reads too slowly is dropped; how many is in the trailer Dropped.
func (p *proxy) tap(w http.ResponseWriter, r *http.Request) {
	namespace, name, ok := strings.Cut(r.FormValue("service"), "/")
	percent, err := 100.0, error(nil)
	if s := r.FormValue("sample"); s != "" {
		percent, err = strconv.ParseFloat(s, 64)
	}
	if !ok || err != nil || !(percent > 0 && percent <= 100) {
		http.Error(w, "give service=NAMESPACE/NAME, and sample as percent from 0 to 100", http.StatusBadRequest)
		return
	}
	tap := p.observer.Tap(lb.Name{Namespace: namespace, Name: name}, percent)
	defer p.observer.Untap(tap)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Trailer", "Dropped")
	defer func() { w.Header().Set("Dropped", strconv.FormatUint(tap.Dropped(), 10)) }()
	flush := http.NewResponseController(w)
	flush.Flush() //nolint:errcheck // The next write shows it.
	encoder := json.NewEncoder(w)
	for {
		select {
		case record := <-tap.Records:
			if encoder.Encode(record) != nil || len(tap.Records) == 0 && flush.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		case <-p.life.Done():
			return
		}
	}
}

// handOnListeners gives all listeners to who connects.
func (p *proxy) handOnListeners(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		if err := p.handOn(conn.(*net.UnixConn)); err != nil {
			p.cfg.Log.Warn("the listeners could not be handed on", "error", err)
		}
		conn.Close()
	}
}

func (p *proxy) handOn(to *net.UnixConn) error {
	p.mu.Lock()
	var files []*os.File
	var fds []int
	for l := range p.listeners {
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			continue
		}
		f, err := tcp.File()
		if err != nil {
			p.cfg.Log.Warn("a listener can't be handed on", "listener", l.Addr(), "error", err)
			continue
		}
		files = append(files, f)
		// Fd() could make the socket a blocking one, for all who have it.
		if raw, err := f.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }) //nolint:errcheck // The file is open.
		}
	}
	p.mu.Unlock()
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	to.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_, _, err := to.WriteMsgUnix([]byte{byte(len(fds))}, unix.UnixRights(fds...), nil)
	return err
}
