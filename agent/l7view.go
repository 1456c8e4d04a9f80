package agent

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/lb"
	"causeway/lb/l7/state"
)

// upgradePatience bounds an upgrade by hand.
const upgradePatience = 20 * time.Second

// l7View is what the local API shows of what is balanced at L7, and does to it.
type l7View struct {
	proxies   *proxies
	routes    func() []lb.Route
	fallbacks func() (uint64, error)
}

// summary for status, and what is wrong.
func (v *l7View) summary() (api.L7Summary, []string) {
	services := map[lb.Name]struct{}{}
	for _, r := range v.routes() {
		services[r.Port.Service] = struct{}{}
	}
	now := v.proxies.snapshot()
	s := api.L7Summary{Services: len(services), Draining: len(now.retiring)}
	if now.current != nil {
		s.PID = now.current.pid
	}
	problems := now.problems
	var err error
	if s.Fallbacks, err = v.fallbacks(); err != nil {
		problems = append(problems, "connections that were balanced at L4 for want of an L7 proxy can't be counted: "+err.Error())
	}
	return s, problems
}

// show asks all proxies.
func (v *l7View) show(ctx context.Context) (out api.L7, err error) {
	if out.Routes = v.routes(); out.Routes == nil {
		out.Routes = []lb.Route{}
	}
	all := v.proxies.snapshot().all()
	out.Proxies = make([]api.L7Proxy, len(all))
	var asking sync.WaitGroup
	for i, proc := range all {
		asking.Go(func() {
			p := &out.Proxies[i]
			p.ProxyStatus = proc.snapshot()
			ports, err := proc.admin.ports(ctx)
			if p.Ports = ports; err != nil {
				p.Error = err.Error()
			}
			if p.Ports == nil {
				p.Ports = []state.PortStatus{}
			}
		})
	}
	asking.Wait()
	out.Fallbacks, err = v.fallbacks()
	return out, err
}

func (v *l7View) handle(mux *http.ServeMux, feed *l7Feed) {
	mux.Handle("GET "+api.PathL7Updates, feed)
	mux.HandleFunc("GET "+api.PathL7, func(w http.ResponseWriter, r *http.Request) {
		all, err := v.show(r.Context())
		answer(w, all, err)
	})
	mux.HandleFunc("GET "+api.PathL7Tap, v.tap)
	mux.HandleFunc("POST "+api.PathL7Upgrade, v.upgrade)
}

func (v *l7View) upgrade(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), upgradePatience)
	defer cancel()
	var done api.L7Upgraded
	if c := v.proxies.snapshot().current; c != nil {
		done.Before = c.pid
	}
	err := v.proxies.Upgrade(ctx)
	if c := v.proxies.snapshot().current; c != nil {
		done.PID = c.pid
	}
	answer(w, done, err)
}

// tap passes on the requests that each proxy sees, until who asked goes or the last proxy ends.
func (v *l7View) tap(w http.ResponseWriter, r *http.Request) {
	service, sample := r.FormValue("service"), r.FormValue("sample")
	namespace, name, ok := strings.Cut(service, "/")
	if sample == "" {
		sample = "100"
	}
	percent, err := strconv.ParseFloat(sample, 64)
	if !ok || namespace == "" || name == "" || err != nil || !(percent > 0 && percent <= 100) {
		answer(w, nil, invalid("want service=NAMESPACE/NAME, and sample as a percentage above 0 and up to 100"))
		return
	}
	known := false
	for _, route := range v.routes() {
		known = known || route.Port.Service.String() == service
	}
	if !known {
		answer(w, nil, missing("service %s is not balanced at L7 on this node; \"clustermesh l7 list\" shows those that are", service))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	defer context.AfterFunc(r.Context(), func() { _ = out.SetWriteDeadline(time.Now()) })()
	if out.Flush() != nil {
		return
	}
	v.follow(r.Context(), "/v1/tap?service="+service+"&sample="+sample, func(record *state.TapRecord) error {
		if err := json.NewEncoder(w).Encode(record); err != nil {
			return err
		}
		return out.Flush()
	})
}

// follow hands what all proxies say to got, one at a time, also those that are started meanwhile, until ctx ends or got fails.
func (v *l7View) follow(ctx context.Context, path string, got func(*state.TapRecord) error) {
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	records := make(chan *state.TapRecord)
	followed := map[int]bool{}
	look := time.NewTicker(proxyAsk)
	defer look.Stop()
	for {
		for _, proc := range v.proxies.snapshot().all() {
			if followed[proc.number] {
				continue
			}
			followed[proc.number] = true
			readers.Go(func() { proc.records(ctx, path, records) })
		}
		select {
		case r := <-records:
			if got(r) != nil {
				return
			}
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}

func (proc *proxyProcess) records(ctx context.Context, path string, to chan<- *state.TapRecord) {
	body, err := proc.admin.open(ctx, http.MethodGet, path)
	if err != nil {
		return
	}
	defer body.Close()
	for lines := json.NewDecoder(body); ; {
		var r state.TapRecord
		if lines.Decode(&r) != nil {
			return
		}
		select {
		case to <- &r:
		case <-ctx.Done():
			return
		}
	}
}
