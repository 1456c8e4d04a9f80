package tunnel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"causeway/identity"
)

// Files in the state directory, besides the keys.
const (
	slotsName = "wireguard.json"
	peersName = "wireguard-peers.json"
)

// slotState is which slots are in use.
type slotState struct {
	Slots     []keptSlot `json:"slots"`
	Preferred uint8      `json:"preferred"`
}

type keptSlot struct {
	Slot uint8     `json:"slot"`
	Made time.Time `json:"made"`
}

// loadSlotState reads the file. Where it is missing or says something else than the key files do, these are believed: a key that is there is in use,
// since other nodes may know it.
func loadSlotState(dir string, log *slog.Logger) (slotState, error) {
	var told slotState
	data, err := os.ReadFile(filepath.Join(dir, slotsName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return slotState{}, fmt.Errorf("reading which WireGuard keys are in use: %w", err)
	default:
		if err := json.Unmarshal(data, &told); err != nil {
			log.Warn("The file of WireGuard's slots is damaged; the keys that are there are used.", "file", filepath.Join(dir, slotsName), "error", err)
			told = slotState{}
		}
	}
	state := slotState{Preferred: told.Preferred}
	preferred := false
	for slot := range uint8(identity.TunnelSlots) {
		info, err := os.Stat(keyFile(dir, slot))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return slotState{}, fmt.Errorf("finding WireGuard's private key: %w", err)
		}
		kept := keptSlot{Slot: slot, Made: info.ModTime()}
		for _, t := range told.Slots {
			if t.Slot == slot && !t.Made.IsZero() {
				kept = t
			}
		}
		state.Slots = append(state.Slots, kept)
		preferred = preferred || slot == state.Preferred
	}
	if !preferred && len(state.Slots) > 0 {
		state.Preferred = state.Slots[0].Slot
	}
	return state, nil
}

func (s slotState) save(dir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := writeState(filepath.Join(dir, slotsName), data); err != nil {
		return fmt.Errorf("writing which WireGuard keys are in use: %w", err)
	}
	return nil
}

// peersState is the peers as last set.
type peersState struct {
	Nodes []identity.Tunnel `json:"nodes"`
	// Endpoints that differ from the nodes' addresses: where packets of these keys last came from.
	Endpoints map[identity.WireGuardKey]netip.AddrPort `json:"endpoints,omitempty"`
}

// decodePeers reads what peersFile writes.
func decodePeers(data []byte) (peersState, error) {
	var state peersState
	if err := json.Unmarshal(data, &state); err != nil {
		return peersState{}, err
	}
	return state, nil
}

// peersFile keeps the peers for the next start. It is written some time after a change, so that many changes at once are one write.
type peersFile struct {
	path string
	due  time.Time // zero: it is as the peers are
	took time.Duration
}

// saveAfter is how long changes are gathered at least. Large files are written more seldom.
const saveAfter = 200 * time.Millisecond

func (f *peersFile) change(now time.Time) {
	if f.due.IsZero() {
		f.due = now.Add(max(saveAfter, 20*f.took))
	}
}

// flush writes the file if it is out of date.
func (f *peersFile) flush(p *peers) error {
	if f == nil || f.due.IsZero() {
		return nil
	}
	start := time.Now()
	data, err := json.Marshal(p.state())
	if err == nil {
		err = writeState(f.path, data)
	}
	f.took = time.Since(start)
	if err != nil {
		f.due = start.Add(time.Minute)
		return fmt.Errorf("writing WireGuard's peers to %s: %w", f.path, err)
	}
	f.due = time.Time{}
	return nil
}

// loadPeers makes the peers as last set the wanted ones. A file that is damaged is as none: the stores will tell them, a little later.
func (w *WireGuard) loadPeers() {
	w.saved = &peersFile{path: filepath.Join(w.cfg.StateDir, peersName)}
	data, err := os.ReadFile(w.saved.path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var state peersState
	if err == nil {
		state, err = decodePeers(data)
	}
	if err != nil {
		w.log.Warn("The file of WireGuard's peers can't be read; they come back when the stores are read.", "file", w.saved.path, "error", err)
		return
	}
	for _, t := range state.Nodes {
		if _, err := w.peers.set(t, w.own()); err != nil {
			w.log.Warn("A peer in the file of WireGuard's peers is refused.", "node", t.NodeName(), "error", err)
		}
	}
	for key, endpoint := range state.Endpoints {
		if p := w.peers.byKey[key]; p != nil && endpoint.IsValid() {
			p.learned = endpoint
		}
	}
}
