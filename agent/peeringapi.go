package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh/peering"
)

// handlePeering adds what the local API has of peering.
func (s *server) handlePeering(mux *http.ServeMux) {
	list(mux, api.PathPeers, func() ([]api.Peer, []<-chan struct{}, error) { return s.agent.view.all(), nil, nil })
	list(mux, api.PathCerts, s.agent.certs.list)
	mux.HandleFunc("GET "+api.PathTokens, s.tokens)
	mux.HandleFunc("POST "+api.PathTokens, s.createToken)
	mux.HandleFunc("DELETE "+api.PathTokens+"/{id}", s.deleteToken)
	mux.HandleFunc("POST "+api.PathConnect, s.connect)
	mux.HandleFunc("DELETE "+api.PathPeers+"/{name}", s.disconnect)
	mux.HandleFunc("POST "+api.PathCerts, s.rotateCerts)
	mux.HandleFunc("POST "+api.PathXDSCert, s.xdsCertificate)
	mux.HandleFunc("POST "+api.PathTroubleshoot, s.troubleshoot)
	mux.HandleFunc("GET "+api.PathBundle, s.bundle)
}

func (s *server) createToken(w http.ResponseWriter, r *http.Request) {
	var req api.TokenRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	token, err := s.agent.peering.CreateToken(r.Context(), peering.TokenOptions{TTL: time.Duration(req.TTL) * time.Second, Isolated: req.Isolated})
	if err != nil {
		answer(w, nil, err)
		return
	}
	answer(w, api.Token{Text: token.String(), ID: token.ID, Expires: token.Expires, Cluster: token.Cluster, Endpoints: token.Endpoints}, nil)
}

func (s *server) tokens(w http.ResponseWriter, r *http.Request) {
	records, err := s.agent.peering.Tokens(r.Context())
	out := make([]api.TokenInfo, 0, len(records))
	for _, t := range records {
		info := api.TokenInfo{ID: t.ID, Created: t.Created, Expires: t.Expires, Node: t.Node, State: "open", Isolated: t.Isolated, For: t.For, UsedBy: t.UsedBy, UsedAt: t.UsedAt}
		switch {
		case t.UsedBy != "":
			info.State = "used"
		case s.agent.clock.Now().After(t.Expires):
			info.State = "expired"
		}
		out = append(out, info)
	}
	answer(w, out, err)
}

func (s *server) deleteToken(w http.ResponseWriter, r *http.Request) {
	answer(w, struct{}{}, s.agent.peering.DeleteToken(r.Context(), r.PathValue("id")))
}

// events writes JSON documents one a line as they come, from several goroutines.
type events struct {
	mu  sync.Mutex
	w   http.ResponseWriter
	out *http.ResponseController
}

func newEvents(w http.ResponseWriter) *events {
	w.Header().Set("Content-Type", "application/x-ndjson")
	e := &events{w: w, out: http.NewResponseController(w)}
	_ = e.out.Flush() // the header, so that who asked knows that it has begun
	return e
}

func (e *events) send(v any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := json.NewEncoder(e.w).Encode(v); err == nil {
		_ = e.out.Flush()
	}
}

func (s *server) connect(w http.ResponseWriter, r *http.Request) {
	var req api.ConnectRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	if _, problems := s.agent.own().state(s.agent.refusals, s.tables.started); len(problems) > 0 {
		answer(w, nil, conflict("this cluster has to be well itself before it is joined with another: %s", strings.Join(problems, "; ")))
		return
	}
	out, begun := newEvents(w), time.Now()
	// Several clusters may be joined: the last event alone has the stage done.
	var held *api.ConnectEvent
	var joined []string
	err := s.agent.peering.Connect(r.Context(), strings.TrimSpace(req.Token), peering.ConnectOptions{Isolated: req.Isolated}, func(ev peering.Event) {
		if held != nil {
			held.Stage = string(peering.StageVerify)
			out.send(held)
			held = nil
		}
		event := api.ConnectEvent{Stage: string(ev.Stage), Peer: ev.Peer, Text: ev.Text, At: milliseconds(ev.At)}
		if ev.Check != nil {
			event.Check = apiCheck(*ev.Check)
		}
		if ev.Stage == peering.StageDone {
			held, joined = &event, append(joined, ev.Peer)
			return
		}
		out.send(event)
	})
	took := time.Since(begun)
	switch {
	case errors.Is(err, peering.ErrRenumbered):
		// The agent ends its requests, and begins anew.
	case err != nil:
		if held != nil {
			held.Stage = string(peering.StageVerify)
			out.send(held)
		}
		out.send(api.ConnectEvent{Stage: string(peering.StageUndo), Error: err.Error(), At: milliseconds(took)})
	case held != nil && len(joined) == 1:
		out.send(held)
	default:
		out.send(api.ConnectEvent{Stage: string(peering.StageDone), Text: fmt.Sprintf("connected with %s in %.1fs", strings.Join(joined, ", "), took.Seconds()), At: milliseconds(took)})
	}
}

func apiCheck(c peering.Check) *api.Check {
	return &api.Check{
		Name: c.Name, From: c.From, To: c.To, Target: c.Target, Outcome: string(c.Outcome), Detail: c.Detail, Cause: c.Cause, Took: milliseconds(c.Took),
	}
}

func (s *server) disconnect(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	d, err := s.agent.peering.Disconnect(r.Context(), r.PathValue("name"), r.URL.Query().Get("force") == "true")
	answer(w, api.DisconnectResult{Cluster: d.Cluster, Known: d.Known, Told: d.Told, Reason: d.Reason, Took: milliseconds(time.Since(begun))}, err)
}

func (s *server) rotateCerts(w http.ResponseWriter, r *http.Request) {
	var req api.CertsRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	if err := s.agent.certs.rotate(r.Context(), req.Name); err != nil {
		answer(w, nil, err)
		return
	}
	certs, _, err := s.agent.certs.list()
	answer(w, certs, err)
}
