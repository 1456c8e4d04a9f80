package peering

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/identity"
	"causeway/identity/pki"
)

func sampleInfo(name string, id identity.ClusterID) identity.ClusterInfo {
	return identity.ClusterInfo{
		Name: name, ID: id, PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(id), 0, 0}), 16)},
		ServiceCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(id), 0}), 24)}, Version: "v0.1.0",
	}
}

func sampleSide(name string, id identity.ClusterID, peers ...known) side {
	return side{
		protocol: Protocol, mesh: "causeway", info: sampleInfo(name, id), authority: pki.Fingerprint{byte(id)}, ring: []byte{byte(id)}, peers: peers,
	}
}

func sampleKnown(name string, id identity.ClusterID, state State) known {
	since := time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC)
	return known{info: sampleInfo(name, id), state: state, since: since, authority: pki.Fingerprint{byte(id)}, replaceable: state == Left}
}

func TestConflicts(t *testing.T) {
	north, south := sampleKnown("north", 3, Connected), sampleKnown("south", 4, Connected)
	for _, tc := range []struct {
		name           string
		joiner, issuer side
		change         func(joiner, issuer *side)
		want           []string // parts of the sentences, one each
	}{
		{name: "none"},
		{name: "protocol", change: func(j, i *side) { i.protocol, i.mesh = 2, "other" }, want: []string{"version 1 of the peering protocol and cluster west version 2: update Causeway in east"}},
		{name: "protocol of the issuer", change: func(j, i *side) { j.protocol = 2 }, want: []string{"update Causeway in west"}},
		{name: "mesh", change: func(j, i *side) { i.mesh = "prod" }, want: []string{"east is of mesh causeway and cluster west of mesh prod"}},
		{name: "itself", change: func(j, i *side) { *i = *j }, want: []string{"of this very cluster, east"}},
		{name: "authority", change: func(j, i *side) { i.authority = j.authority }, want: []string{"have the same certificate authority"}},
		{name: "name", change: func(j, i *side) { i.info.Name = "east" }, want: []string{"both clusters are called east"}},
		{name: "ID", joiner: sampleSide("east", 2), change: func(j, i *side) {
			j.info.PodCIDRs, j.info.ServiceCIDRs, j.authority = sampleInfo("", 9).PodCIDRs, sampleInfo("", 9).ServiceCIDRs, pki.Fingerprint{9}
		}, want: []string{"cluster ID 2 of east is taken by west: leave cluster.id out of the configuration of east's agents and start them again, one after the other; then it takes one that is free (such as 1) when it joins"}},
		{name: "ID of a peer's peer", issuer: sampleSide("west", 2, sampleKnown("north", 3, Connected)), change: func(j, i *side) { j.info.ID = 3 },
			want: []string{"cluster ID 3 of east is taken by north: leave cluster.id out of the configuration of east's agents and start them again, one after the other; then it takes one that is free (such as 1) when it joins"}},
		{name: "ID of the joiner's peer", joiner: sampleSide("east", 1, north), change: func(j, i *side) { i.info.ID, j.ring = 3, i.ring },
			want: []string{"cluster ID 3 of west is taken by north, a peer of this cluster: leave cluster.id out of the configuration of west's agents and start them again, one after the other; then it takes one that is free (such as 2) when it joins"}},
		{name: "ranges", change: func(j, i *side) {
			j.info.PodCIDRs = i.info.PodCIDRs
			j.info.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24")}
		}, want: []string{
			"pod CIDR 10.2.0.0/16 of east and pod CIDR 10.2.0.0/16 of west overlap",
			"service CIDR 10.2.0.0/24 of east and pod CIDR 10.2.0.0/16 of west overlap",
		}},
		{name: "ranges of a peer's peer", issuer: sampleSide("west", 2, north), change: func(j, i *side) { j.info.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.3.7.0/24")} },
			want: []string{"service CIDR 10.3.7.0/24 of east and pod CIDR 10.3.0.0/16 of north overlap"}},
		{name: "all at once", change: func(j, i *side) { j.mesh, j.info.ID = "x", 2; j.info.PodCIDRs = i.info.PodCIDRs },
			want: []string{"of mesh x", "cluster ID 2", "overlap"}},
		{name: "capabilities", change: func(j, i *side) {
			i.requires, j.requires = []string{"a", "b"}, []string{"c"}
			j.info.Capabilities = []string{"b"}
		}, want: []string{
			"cluster west lacks c, which cluster east needs", "cluster east lacks a, which cluster west needs",
		}},
		{name: "both encrypt", change: func(j, i *side) { j.info.Encryption, i.info.Encryption = "all", "inter-cluster" }},
		{name: "the joiner encrypts", change: func(j, i *side) { j.info.Encryption, i.info.Encryption = "all", "off" },
			want: []string{"cluster east encrypts (encryption.mode all) and cluster west does not (off): give both all or inter-cluster, or both off"}},
		{name: "the issuer encrypts, and the joiner is of before encryption", change: func(j, i *side) {
			i.info.Encryption, i.info.Capabilities, i.requires = "inter-cluster", []string{"wireguard"}, []string{"wireguard"}
		}, want: []string{
			"cluster west encrypts (encryption.mode inter-cluster) and cluster east does not (off)",
			"cluster east lacks wireguard, which cluster west needs of its peers",
		}},
		{name: "no family of pods in common", change: func(j, i *side) { j.info.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("fd01::/56")} },
			want: []string{"pods of cluster east have IPv6 addresses only and those of cluster west IPv4 ones, so none could reach another: give one of the clusters a range of the other family"}},
		{name: "one is dual-stack", change: func(j, i *side) { j.info.PodCIDRs = append(j.info.PodCIDRs, netip.MustParsePrefix("fd01::/56")) }},
		{name: "no family of the underlay in common", change: func(j, i *side) {
			j.store, j.endpoints = []string{"https://192.0.2.1:2379"}, []string{"192.0.2.1:7958"}
			i.store, i.endpoints = []string{"[2001:db8::1]:2379"}, []string{"[2001:db8::1]:7958"}
		}, want: []string{"cluster east is reached at IPv4 addresses only and cluster west at IPv6 ones, so their nodes cannot reach each other"}},
		{name: "one can be reached both ways", change: func(j, i *side) {
			j.store, j.endpoints = []string{"https://192.0.2.1:2379"}, []string{"[2001:db8::2]:7958"}
			i.store, i.endpoints = []string{"https://[2001:db8::1]:2379"}, []string{"[2001:db8::1]:7958"}
		}},
		{name: "a name may be of any family", change: func(j, i *side) {
			j.store, j.endpoints = []string{"https://192.0.2.1:2379"}, []string{"192.0.2.1:7958"}
			i.store, i.endpoints = []string{"https://etcd.example:2379"}, []string{"[2001:db8::1]:7958"}
		}},
		{name: "connected", joiner: sampleSide("east", 1, sampleKnown("west", 2, Connected)), issuer: sampleSide("west", 2, sampleKnown("east", 1, Connected)),
			want: []string{"already connected with west since 2026-10-01T12:00:00Z: disconnect first"}},
		{name: "joining", joiner: sampleSide("east", 1, sampleKnown("west", 2, Joining)), want: []string{"is being connected with west since"}},
		{name: "left there", joiner: sampleSide("east", 1, sampleKnown("west", 2, Left)), issuer: sampleSide("west", 2, sampleKnown("east", 1, Left))},
		{name: "disconnected here only", issuer: sampleSide("west", 2, sampleKnown("east", 1, Connected))},
		{name: "another of this name there", issuer: sampleSide("west", 2, sampleKnown("east", 1, Connected)), change: func(j, i *side) { j.authority[1] = 1 },
			want: []string{"west is connected with another cluster called east"}},
		{name: "a mesh already", joiner: sampleSide("east", 1, north),
			want: []string{"east is in a mesh with north already: create the token there, in east, and run connect in west instead"}},
		{name: "two meshes", joiner: sampleSide("east", 1, north), issuer: sampleSide("west", 2, south), want: []string{"meshes don't merge"}},
		{name: "the same mesh", joiner: sampleSide("east", 1, north), issuer: sampleSide("west", 2, south), change: func(j, i *side) { j.ring = i.ring }},
		{name: "known peers", joiner: sampleSide("east", 1, north), issuer: sampleSide("west", 2, north)},
		{name: "a peer that has left", joiner: sampleSide("east", 1, sampleKnown("north", 2, Left))},
	} {
		if tc.joiner.protocol == 0 {
			tc.joiner = sampleSide("east", 1)
		}
		if tc.issuer.protocol == 0 {
			tc.issuer = sampleSide("west", 2)
		}
		if tc.change != nil {
			tc.change(&tc.joiner, &tc.issuer)
		}
		got := conflicts(tc.joiner, tc.issuer)
		fits := slices.EqualFunc(got, tc.want, strings.Contains)
		if !fits {
			t.Errorf("%s: got\n%s\nwant\n%s", tc.name, strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
		}
	}
}

// TestAnotherIDIsTaken: a cluster whose ID was assigned takes another one if that is all that is in the way.
func TestAnotherIDIsTaken(t *testing.T) {
	renumber := func(context.Context, identity.ClusterID) error { return nil }
	west := side{info: sampleInfo("west", 2), authority: pki.Fingerprint{1}, mesh: "m"}
	east := side{info: sampleInfo("east", 2), authority: pki.Fingerprint{2}, mesh: "m"}
	east.info.PodCIDRs, east.info.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16")}, []netip.Prefix{netip.MustParsePrefix("100.64.77.0/24")}
	overlapping := east
	overlapping.info.PodCIDRs = west.info.PodCIDRs
	apart := east
	apart.info.ID = 3
	for name, test := range map[string]struct {
		own      side
		renumber func(context.Context, identity.ClusterID) error
		want     identity.ClusterID
	}{
		"assigned":           {east, renumber, 1},
		"configured":         {east, nil, 0},
		"more in the way":    {overlapping, renumber, 0},
		"nothing in the way": {apart, renumber, 0},
	} {
		c := &connect{s: &Service{Config: Config{Renumber: test.renumber}}, own: test.own, issuer: west}
		if got := c.otherID(conflicts(test.own, west)); got != test.want {
			t.Errorf("%s: it takes %d, want %d; conflicts: %q", name, got, test.want, conflicts(test.own, west))
		}
	}
}
