package kvstore

import (
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func memoryHarness(t *testing.T) *harness {
	server := NewMemory()
	t.Cleanup(func() { server.Close() })
	var clients []*Memory
	away := func(during func()) {
		for _, c := range clients {
			c.Disconnect()
		}
		during()
		for _, c := range clients {
			c.Reconnect()
		}
	}
	open := func(t *testing.T, q Quota) Store {
		c := server.Client()
		c.SetQuota(q)
		clients = append(clients, c)
		t.Cleanup(func() { c.Close() })
		return c
	}
	return &harness{
		open:    func(t *testing.T) Store { return open(t, Quota{}) },
		limited: open,
		expire: func(t *testing.T, during func(Store)) {
			away(func() { server.ExpireLeases(); during(server) })
		},
		cut: func(t *testing.T, during func(Store)) {
			away(func() { during(server); server.Compact() })
		},
		wipe: func(*testing.T) { server.Wipe() },
	}
}

// etcdHarness starts a server whose clients reach it through a proxy, so that the network can be cut.
func etcdHarness(t *testing.T) *harness {
	server := startProcess(t)
	link := startLink(t, server.config.ListenClient)
	const ttl = 2 * time.Second
	open := func(t *testing.T, q Quota) Store {
		return server.dial(t, func(c *Config) { c.Endpoints, c.LeaseTTL, c.Quota = []string{link.address}, ttl, q })
	}
	return &harness{
		open:    func(t *testing.T) Store { return open(t, Quota{}) },
		limited: open,
		expire: func(t *testing.T, during func(Store)) {
			link.cut()
			direct := server.dial(t, nil)
			eventually(t, 20*time.Second, "all leases expire", func() bool {
				resp, err := direct.(*etcd).client.Leases(t.Context())
				return err == nil && len(resp.Leases) == 0
			})
			during(direct)
			link.heal()
		},
		cut: func(t *testing.T, during func(Store)) {
			link.cut()
			direct := server.dial(t, nil)
			during(direct)
			compact(t, direct)
			link.heal()
		},
		wipe: func(t *testing.T) {
			server.kill()
			server.wipe(t)
			server.start(t)
		},
	}
}

func compact(t *testing.T, s Store) {
	t.Helper()
	_, err := s.(*etcd).client.Compact(t.Context(), s.Status().Revision, clientv3.WithCompactPhysical())
	must(t, err)
}
