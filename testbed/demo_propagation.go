package testbed

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/datapath"
)

const (
	// lookInterval is how often the kernel's map is read while it is waited for: it bounds the error of a sample.
	lookInterval = 250 * time.Microsecond
	// sampleTimeout is when a sample is given up, and the demo with it.
	sampleTimeout = 10 * time.Second
	// reportEvery so many samples the demo says how far it is.
	reportEvery = 20

	propagationStep = "measure how soon east's kernel knows a new endpoint of west"
)

// DemoPropagation is how long it took from the request that added an endpoint in west
// until east's kernel knew its address, in milliseconds.
type DemoPropagation struct {
	P50     float64 `json:"p50"`
	P99     float64 `json:"p99"`
	Samples int     `json:"samples"`
}

// measurePropagation adds endpoints in west, one after the other, and looks into the maps of a node in east.
func (d *demo) measurePropagation(ctx context.Context) (string, error) {
	client := d.bed.Client("west", nodeName(1))
	defer client.Close()
	east := d.kernel.nodes[0]
	samples := make([]time.Duration, 0, d.o.Samples)
	for i := range d.o.Samples {
		took, err := d.sample(ctx, client, east.maps, fmt.Sprintf("probe-%d", i+1))
		if err != nil {
			return "", fmt.Errorf("after %d samples: %w", i, err)
		}
		samples = append(samples, took)
		if len(samples)%reportEvery == 0 {
			d.report(DemoEvent{Step: propagationStep, Detail: fmt.Sprintf("%d of %d", len(samples), d.o.Samples)})
		}
	}
	p := DemoPropagation{P50: percentile(samples, 50), P99: percentile(samples, 99), Samples: len(samples)}
	d.result.Propagation = p
	return fmt.Sprintf("p50 %.1f ms, p99 %.1f ms of %d", p.P50, p.P99, p.Samples), nil
}

// sample measures one endpoint, and takes it away again.
func (d *demo) sample(ctx context.Context, client *api.Client, maps *datapath.Maps, name string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, sampleTimeout, fmt.Errorf("%s is not known after %v", name, sampleTimeout))
	defer cancel()
	ns := d.bed.podNS("west", name)
	if err := createNS(ns); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, deleteNS(ns)) }()
	prefix, took, err := d.addAndLook(ctx, client, maps, api.EndpointRequest{
		Namespace: "default", Name: name, Labels: map[string]string{"app": "probe"}, NetNS: netnsPath(ns),
	})
	if err != nil {
		return 0, err
	}
	if err := client.DeleteEndpoint(ctx, "default", name); err != nil {
		return 0, err
	}
	return took, waitUnknown(ctx, maps, prefix)
}

// addAndLook adds an endpoint and returns its address, and how long it took from before the request until the
// address was in the map. The agent says which address it is only in its answer, perhaps after that has
// appeared, so the time is kept for every one that is new.
func (d *demo) addAndLook(ctx context.Context, client *api.Client, maps *datapath.Maps, req api.EndpointRequest) (netip.Prefix, time.Duration, error) {
	seen := map[netip.Prefix]time.Duration{}
	if err := note(maps, seen, 0); err != nil {
		return netip.Prefix{}, 0, err
	}
	var adding sync.WaitGroup
	defer adding.Wait()
	answer := make(chan addition, 1)
	began := time.Now()
	adding.Go(func() {
		ep, err := client.AddEndpoint(ctx, req)
		answer <- addition{ep, err}
	})
	var prefix netip.Prefix
	for {
		if err := note(maps, seen, time.Since(began)); err != nil {
			return prefix, 0, err
		}
		if took, ok := seen[prefix]; ok {
			return prefix, took, nil
		}
		select {
		case a := <-answer:
			if a.err != nil {
				return prefix, 0, a.err
			}
			prefix = netip.PrefixFrom(a.endpoint.Address, a.endpoint.Address.BitLen())
		case <-ctx.Done():
			return prefix, 0, context.Cause(ctx)
		case <-time.After(lookInterval):
		}
	}
}

// addition is the outcome of adding an endpoint.
type addition struct {
	endpoint *api.Endpoint
	err      error
}

// note writes down when the prefixes that are in the map were first seen.
func note(maps *datapath.Maps, seen map[netip.Prefix]time.Duration, now time.Duration) error {
	entries, err := maps.ListAddresses()
	for _, e := range entries {
		if _, ok := seen[e.Prefix]; !ok {
			seen[e.Prefix] = now
		}
	}
	return err
}

// waitUnknown waits until the map has forgotten an address.
func waitUnknown(ctx context.Context, maps *datapath.Maps, prefix netip.Prefix) error {
	for {
		_, known, err := maps.LookupAddress(prefix)
		if err != nil || !known {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still known: %w", prefix, context.Cause(ctx))
		case <-time.After(lookInterval):
		}
	}
}

// percentile returns the p-th percentile by nearest rank, in milliseconds to a tenth.
func percentile(samples []time.Duration, p int) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	rank := (len(sorted)*p + 99) / 100
	ms := sorted[rank-1].Seconds() * 1000
	return math.Round(ms*10) / 10
}
