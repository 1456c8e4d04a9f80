package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"causeway/lb"
	"causeway/lb/l7/state"
)

// Paths of what is balanced at L7.
const (
	PathL7 = "/v1/l7"
	// PathL7Updates is what proxies read: lines of arrays of state.Update, which go on for ever.
	PathL7Updates = "/v1/l7/updates"
	PathL7Tap     = "/v1/l7/tap" // ?service=NAMESPACE/NAME[&sample=PERCENT]: state.TapRecord, one a line
	PathL7Upgrade = "/v1/l7/upgrade"
)

// L7 is what this node balances at L7.
type L7 struct {
	// Routes are the ports that shall be balanced at L7.
	Routes []lb.Route `json:"routes"`
	// Proxies of this node: the one in service first, then those that finish what they have.
	Proxies []L7Proxy `json:"proxies"`
	// Fallbacks counts connections that were balanced at L4 because there was no proxy.
	Fallbacks uint64 `json:"fallbacks"`
}

// L7Proxy is one proxy, with what it says of each port.
type L7Proxy struct {
	state.ProxyStatus
	Ports []state.PortStatus `json:"ports"`
	// Error says why it could not be asked.
	Error string `json:"error,omitempty"`
}

// L7Summary is L7 in short, for Status.
type L7Summary struct {
	// Services that are balanced at L7.
	Services int `json:"services"`
	// PID of the proxy in service; 0: there is none. Draining counts those that finish what they have.
	PID       int    `json:"pid,omitempty"`
	Draining  int    `json:"draining,omitempty"`
	Fallbacks uint64 `json:"fallbacks,omitempty"`
}

// L7Upgraded tells which proxy serves after an upgrade.
type L7Upgraded struct {
	PID int `json:"pid"`
	// Before is the process that served until then, which finishes what it has.
	Before int `json:"before"`
}

// L7 returns what the node balances at L7, and how.
func (c *Client) L7(ctx context.Context) (*L7, error) { return get[*L7](ctx, c, PathL7) }

// UpgradeL7 replaces the proxy by a new one, of the program that is on the node's disk now, and returns when that serves.
func (c *Client) UpgradeL7(ctx context.Context) (*L7Upgraded, error) {
	out := new(L7Upgraded)
	return out, c.do(ctx, http.MethodPost, PathL7Upgrade, "", nil, out)
}

// TapL7 yields the requests to a service that end from now on, so many percent of them, until ctx ends.
func (c *Client) TapL7(ctx context.Context, service lb.Name, percent float64) iter.Seq2[state.TapRecord, error] {
	return func(yield func(state.TapRecord, error) bool) {
		query := url.Values{"service": {service.String()}, "sample": {strconv.FormatFloat(percent, 'f', -1, 64)}}
		resp, err := c.openWith(ctx, c.patient, http.MethodGet, PathL7Tap+"?"+query.Encode(), "", nil)
		if err != nil {
			yield(state.TapRecord{}, err)
			return
		}
		defer resp.Body.Close()
		for lines := json.NewDecoder(resp.Body); ; {
			var record state.TapRecord
			if err := lines.Decode(&record); err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				yield(state.TapRecord{}, c.streamError(ctx, err))
				return
			}
			if !yield(record, nil) {
				return
			}
		}
	}
}
