package l7

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/state"
)

const (
	// maxLine bounds a line of updates, in bytes.
	maxLine = 16 << 20
	// The pauses between two tries to reach the agent.
	firstPause, longestPause = 100 * time.Millisecond, 5 * time.Second
)

// feed brings the desired state to the table, and keeps what of it the table doesn't tell: the frontends of each port.
type feed struct {
	table  *balance.Table
	log    *slog.Logger
	synced chan struct{} // closed when a whole state was read for the first time

	mu        sync.Mutex
	once      bool
	frontends map[netip.AddrPort]lb.PortKey
	fresh     map[netip.AddrPort]lb.PortKey // between Reset and Synced
	problem   string
	changed   chan struct{}
}

func newFeed(table *balance.Table, log *slog.Logger) *feed {
	return &feed{table: table, log: log, synced: make(chan struct{}), frontends: map[netip.AddrPort]lb.PortKey{}, changed: make(chan struct{})}
}

// follow reads the agent's state until ctx ends. With no agent the table stays as it is.
func (f *feed) follow(ctx context.Context, socket string) {
	pause := firstPause
	for ctx.Err() == nil {
		read, err := f.readAgent(ctx, socket)
		if ctx.Err() != nil {
			return
		}
		if read {
			pause = firstPause
		}
		f.report(fmt.Sprintf("The agent's state can't be read from %s: %v. The proxy goes on with what it knows; look whether the agent runs.", socket, err))
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// readAgent reads one stream to its end, and tells whether anything came.
func (f *feed) readAgent(ctx context.Context, socket string) (read bool, err error) {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	from := "http://agent/v1/l7/updates"
	if knows, _ := f.status(); knows {
		from += "?" + state.Knows
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return false, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return false, fmt.Errorf("it answers %s", response.Status)
	}
	return f.read(response.Body)
}

// readFile takes a file's updates. One without Synced is whole, too.
func (f *feed) readFile(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("the state can't be read: %w", err)
	}
	defer file.Close()
	if _, err := f.read(file); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the state in %s can't be read: %w", name, err)
	}
	f.apply([]state.Update{{Synced: true}})
	return nil
}

// read takes lines to their end, which is io.EOF.
func (f *feed) read(r io.Reader) (read bool, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var updates []state.Update
		if err := json.Unmarshal(lines.Bytes(), &updates); err != nil {
			return read, fmt.Errorf("a line of updates is not what it should be: %w", err)
		}
		f.apply(updates)
		read = true
	}
	if lines.Err() != nil {
		return read, lines.Err()
	}
	return read, io.EOF
}

func (f *feed) apply(updates []state.Update) {
	f.table.Apply(updates)
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range updates {
		f.keep(&updates[i])
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

// keep what concerns frontends. f.mu is held.
func (f *feed) keep(u *state.Update) {
	current := f.frontends
	if f.fresh != nil {
		current = f.fresh
	}
	switch {
	case u.Reset:
		f.fresh = map[netip.AddrPort]lb.PortKey{}
	case u.Synced:
		if f.fresh != nil {
			f.frontends, f.fresh = f.fresh, nil
		}
		f.problem = ""
		if !f.once {
			f.once = true
			close(f.synced)
		}
	case u.Frontend != nil:
		current[netip.AddrPortFrom(u.Frontend.Address, u.Frontend.Port)] = u.Frontend.Target
	case u.FrontendGone != nil:
		delete(current, netip.AddrPortFrom(u.FrontendGone.Address, u.FrontendGone.Port))
	}
}

func (f *feed) report(problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.problem != problem {
		f.log.Warn(problem)
	}
	f.problem = problem
}

// status tells whether a whole state was read, and what is wrong, if anything is.
func (f *feed) status() (synced bool, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.once, f.problem
}

// all frontends by port, in their order, and a channel that is closed at the next change.
func (f *feed) all() (map[lb.PortKey][]netip.AddrPort, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	byPort := map[lb.PortKey][]netip.AddrPort{}
	for a, key := range f.frontends {
		byPort[key] = append(byPort[key], a)
	}
	for _, list := range byPort {
		slices.SortFunc(list, netip.AddrPort.Compare)
	}
	return byPort, f.changed
}
