package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"causeway/identity"
)

// Paths of encryption and metrics.
const (
	PathEncryption = "/v1/encryption"
	PathRotate     = "/v1/encryption/rotate" // POST: change this node's key
	PathMetrics    = "/v1/metrics"           // Prometheus' text format
)

// Encryption is how packets between this node and the others are encrypted.
type Encryption struct {
	Mode identity.Encryption `json:"mode"`
	// Devices of this node: one, and two while its key is changed.
	Devices []WireGuardDevice `json:"devices"`
	// RotateEvery is the time between two changes of the key, in seconds, 0 is never; Next is when the next one is due.
	RotateEvery int64     `json:"rotateEverySeconds"`
	Next        time.Time `json:"nextRotation,omitzero"`
	// Rotation is the change that goes on, if one does; Rotations how many have ended since the agent's start.
	Rotation  *Rotation `json:"rotation,omitempty"`
	Rotations uint64    `json:"rotations"`
	// Nodes are all others, in order of their names.
	Nodes []EncryptionNode `json:"nodes"`
	// Drops are those of what should have been encrypted, or came in without.
	Drops []BPFDrop `json:"drops"`
	// Repairs counts what somebody else had removed, by what: device, rule, route, peer, address.
	Repairs  map[string]uint64 `json:"repairs"`
	Problems []string          `json:"problems"`
}

// EncryptionSummary is encryption in short.
type EncryptionSummary struct {
	Mode identity.Encryption `json:"mode"`
	Kind string              `json:"kind,omitempty"` // of device: kernel or userspace; empty if there is none
	// Nodes counts the others by how packets get there.
	Nodes map[identity.TunnelMode]int `json:"nodes"`
	// Rotating: this node's key is being changed.
	Rotating bool `json:"rotating,omitempty"`
}

// WireGuardDevice is that of one key.
type WireGuardDevice struct {
	Slot    uint8                 `json:"slot"`
	Name    string                `json:"name"`
	Kind    string                `json:"kind"` // kernel or userspace
	PID     int                   `json:"pid,omitempty"`
	Key     identity.WireGuardKey `json:"key"`
	Port    uint16                `json:"port"`
	Address string                `json:"address"` // of the tunnel's end
	MTU     int                   `json:"mtu"`
	Made    time.Time             `json:"made,omitzero"` // when the key was made
	// Preferred by the others.
	Preferred bool `json:"preferred"`
	// DroppedReceive and DroppedTransmit are packets that the device dropped.
	DroppedReceive  uint64 `json:"droppedReceive"`
	DroppedTransmit uint64 `json:"droppedTransmit"`
}

// EncryptionNode is how packets get to another node.
type EncryptionNode struct {
	Cluster string              `json:"cluster"`
	Node    string              `json:"node"`
	Mode    identity.TunnelMode `json:"mode"`
	Why     string              `json:"why,omitempty"` // it is closed
	MTU     int                 `json:"mtu"`
	// What follows is of nodes in mode wireguard: the slots of the keys in use, this node's and the other's.
	Slot   uint8 `json:"slot"`
	Remote uint8 `json:"remoteSlot"`
	// Session: there is one, and packets go.
	Session   bool      `json:"session"`
	Handshake time.Time `json:"lastHandshake,omitzero"`
	Endpoint  string    `json:"endpoint,omitempty"`
	// Received and Transmitted are bytes in and out, by all keys.
	Received    uint64 `json:"receivedBytes"`
	Transmitted uint64 `json:"transmittedBytes"`
	// Keepalive is the time between two packets that keep a NAT open, in seconds; 0: none are sent.
	Keepalive int       `json:"keepaliveSeconds"`
	Status    RowStatus `json:"status"`
}

// Rotation is a change of this node's key.
type Rotation struct {
	// Step: moving (this node's packets move to the new key) or quieting (the others' do).
	Step  string    `json:"step"`
	Since time.Time `json:"since"`
	// Waiting are the nodes that are waited for, the longest first.
	Waiting []RotationWait `json:"waiting"`
	// Store: it waits for this cluster's store to take the keys.
	Store bool `json:"waitsForStore,omitempty"`
}

// RotationWait is a node that a change of the key waits for.
type RotationWait struct {
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"`
	Why     string    `json:"why"`
	Since   time.Time `json:"since"`
}

// RotateResult tells of a change of the key that has begun.
type RotateResult struct {
	// Key is the new one.
	Key identity.WireGuardKey `json:"key"`
	// Joined: a change was going on already, and no other one was begun.
	Joined bool `json:"joined"`
}

// Encryption returns how packets between the node and the others are encrypted.
func (c *Client) Encryption(ctx context.Context) (*Encryption, error) {
	return get[*Encryption](ctx, c, PathEncryption)
}

// Metrics writes the node's metrics in Prometheus' text format to w.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	resp, err := c.open(ctx, http.MethodGet, PathMetrics, "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("metrics of the agent at %s: %w", c.socket, err)
	}
	return nil
}

// Rotate begins a change of the node's key, which loses no packet, or joins one that goes on.
func (c *Client) Rotate(ctx context.Context) (*RotateResult, error) {
	out := new(RotateResult)
	return out, c.do(ctx, http.MethodPost, PathRotate, "", nil, out)
}
