package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"causeway/agent/api"
	"causeway/datapath"
	"causeway/lb"
)

// maxBody bounds what the local API reads of a request, in bytes.
const maxBody = 4 << 20

// shutdownGrace bounds how long requests that are under way may take to end when the agent does.
const shutdownGrace = 3 * time.Second

// watchPause bounds how often a watched list is sent again.
const watchPause = 100 * time.Millisecond

// server answers the local API. Who may open the socket may do everything: its mode is 0600.
type server struct {
	tables    *view
	endpoints *endpoints
	services  *services
	life      *life
	agent     *agent
	feed      *l7Feed
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	list(mux, api.PathStatus, s.tables.status)
	list(mux, api.PathNodes, s.tables.nodes)
	list(mux, api.PathEndpoints, s.tables.endpoints)
	list(mux, api.PathIdentities, s.tables.identities)
	list(mux, api.PathAddresses, s.tables.addresses)
	list(mux, api.PathServices, s.tables.services)
	list(mux, api.PathBPFLB, s.tables.bpfLB)
	list(mux, api.PathBPFAddr, s.tables.bpfAddresses)
	list(mux, api.PathBPFDrops, s.tables.bpfDrops)
	list(mux, api.PathMembers, s.tables.members)
	list(mux, api.PathEncryption, s.tables.encryption)
	mux.HandleFunc("POST "+api.PathRotate, s.rotate)
	mux.Handle("GET "+api.PathMetrics, metricsHandler(s.tables.snapshot, s.agent.proxies.metrics))
	s.tables.l7.handle(mux, s.feed)
	s.handlePeering(mux)
	mux.HandleFunc("POST "+api.PathDrain, s.drain(true))
	mux.HandleFunc("DELETE "+api.PathDrain, s.drain(false))
	mux.HandleFunc("POST "+api.PathKeyring, s.keyring)
	mux.HandleFunc("GET "+api.PathCNI, func(w http.ResponseWriter, _ *http.Request) {
		reason := s.endpoints.whyNoSandboxes()
		answer(w, api.CNI{Ready: reason == "", Reason: reason}, nil)
	})
	mux.HandleFunc("POST "+api.PathEndpoints, s.addEndpoint)
	mux.HandleFunc("PATCH "+api.PathEndpoints+"/{namespace}/{name}", s.patchEndpoint)
	mux.HandleFunc("DELETE "+api.PathEndpoints+"/{namespace}/{name}", s.deleteEndpoint)
	mux.HandleFunc("POST "+api.PathServices, s.applyServices)
	mux.HandleFunc("DELETE "+api.PathServices+"/{namespace}/{name}", s.deleteService)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, missing("%s %s: this agent has no such call; is the command of the same version?", r.Method, r.URL.Path))
	})
	return mux
}

// listing returns the newest state and a channel that closes when it may have changed; without one the
// state is looked at again every second.
type listing[T any] func() (T, []<-chan struct{}, error)

// list serves a listing: once, or with ?watch=true again whenever it changes.
func list[T any](mux *http.ServeMux, path string, of listing[T]) {
	mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "true" {
			stream(w, r, of)
			return
		}
		state, _, err := of()
		answer(w, state, err)
	})
}

func stream[T any](w http.ResponseWriter, r *http.Request, of listing[T]) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	// Who asked and does not read holds nobody up at the end.
	defer context.AfterFunc(r.Context(), func() { _ = out.SetWriteDeadline(time.Now()) })()
	var last []byte
	for {
		state, changed, err := of()
		if err != nil {
			return
		}
		data, err := json.Marshal(state)
		if err != nil {
			return
		}
		if string(data) != string(last) {
			last = data
			if _, err := w.Write(append(data, '\n')); err != nil || out.Flush() != nil {
				return
			}
		}
		if !waitChange(r.Context(), changed) {
			return
		}
	}
}

// waitChange returns true when something may have changed, false when ctx has ended.
func waitChange(ctx context.Context, changed []<-chan struct{}) bool {
	longest := time.Second
	if len(changed) > 0 {
		longest = time.Minute
	}
	ctx, cancel := context.WithTimeoutCause(ctx, longest, errTick)
	defer cancel()
	set := statedb.NewWatchSet()
	set.Add(changed...)
	// The wait itself lets changes gather for a moment, so that a burst of them is sent once.
	_, _ = set.Wait(ctx, watchPause)
	return ctx.Err() == nil || errors.Is(context.Cause(ctx), errTick)
}

var errTick = errors.New("time to look again")

func (s *server) addEndpoint(w http.ResponseWriter, r *http.Request) {
	var req api.EndpointRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	ep, err := s.endpoints.Add(r.Context(), req)
	added := api.Endpoint{Endpoint: ep}
	for _, a := range ep.Addresses() {
		added.Gateways = append(added.Gateways, datapath.PodGateway(a))
	}
	answer(w, added, err)
}

func (s *server) patchEndpoint(w http.ResponseWriter, r *http.Request) {
	var patch api.EndpointPatch
	if err := decode(r, &patch); err != nil {
		answer(w, nil, err)
		return
	}
	ep, err := s.endpoints.SetState(r.PathValue("namespace")+"/"+r.PathValue("name"), patch.State)
	answer(w, api.Endpoint{Endpoint: ep}, err)
}

func (s *server) deleteEndpoint(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("namespace") + "/" + r.PathValue("name")
	if sandbox := r.URL.Query().Get("sandbox"); sandbox != "" {
		answer(w, struct{}{}, s.endpoints.DeleteSandbox(r.Context(), id, sandbox))
		return
	}
	answer(w, struct{}{}, s.endpoints.Delete(r.Context(), id))
}

func (s *server) applyServices(w http.ResponseWriter, r *http.Request) {
	manifests, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		answer(w, nil, invalid("manifests: %w", err))
		return
	}
	results, err := s.services.Apply(r.Context(), manifests)
	answer(w, results, err)
}

func (s *server) deleteService(w http.ResponseWriter, r *http.Request) {
	name := lb.Name{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}
	answer(w, struct{}{}, s.services.Delete(r.Context(), name))
}

func decode(r *http.Request, into any) error {
	decoder := json.NewDecoder(io.LimitReader(r.Body, maxBody))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return invalid("request: %w", err)
	}
	return nil
}

func answer(w http.ResponseWriter, body any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(httpStatus(err))
		body = api.Error{Message: err.Error()}
	}
	_ = json.NewEncoder(w).Encode(body)
}

// serve answers on the listener until ctx ends, and returns when the requests that were under way have ended too:
// what they work with is closed after that.
func serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	var running sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			running.Add(1)
			defer running.Done()
			handler.ServeHTTP(w, r)
		}),
		BaseContext: func(net.Listener) context.Context { return ctx }, ReadHeaderTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	// The requests' contexts have ended with ctx. Who does not let go in time loses the connection.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		_ = srv.Close()
	}
	running.Wait()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// listen takes over the socket of an agent that is gone, but not that of a live one.
func listen(socket string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s: another agent answers there; stop it first, or give this one another socket", socket)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("local API: %w%s", err, tooLong(socket))
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

func tooLong(socket string) string {
	if len(socket) > 107 {
		return "; a unix socket's path holds at most 107 bytes, this one has " + fmt.Sprint(len(strings.TrimSpace(socket)))
	}
	return ""
}
